"""What a set-up needs and how fast it can be, before it is rented: shapes, bytes and seconds. No torch, no files of
weights, no HTTP.

`settings` says what is planned, `published` and `models` which shapes that is, `devices` what it runs on, `memory` what
fits, `roofline` and `speculation` how long a step takes and what drafting makes of it, `plan` puts them together.
Assumptions and their limits: docs/planning.md.
"""
