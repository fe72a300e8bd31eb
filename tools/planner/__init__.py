"""The planner: the memory and speed of a setup before it is rented, from shapes, bytes and rates alone. No torch, no
weights, no HTTP.

`published`, `models` and `heads` have the shapes, `devices` the hardware, `setup` both together. `memory` computes what
fits, `roofline` the time of a step, `speculation` the effect of drafting; `plan` combines them. Assumptions and their
limits: docs/planning.md.
"""
