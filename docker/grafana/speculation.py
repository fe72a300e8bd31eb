"""The dashboard *Speculation*: whether drafting pays, and which drafts do."""

from __future__ import annotations

from panels import Board, Panel, Query, Row
from service import BLUE, GREEN, GREY, RED, YELLOW, mean

NO_DECODING = "No decoding in this time range"
NO_DRAFTS = "No drafts in this time range"


def ratio(numerator: str, denominator: str, over: str = "$__rate_interval", by: str = "") -> str:
    """The ratio of two counters' rates, empty where the divisor is 0."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({numerator}{{$i}}[{over}])) / ({grouped}(rate({denominator}{{$i}}[{over}])) > 0)"


TOKENS = "pilotfish_decode_tokens_total"
SECONDS = "pilotfish_decode_seconds_total"
PREDICTED = "pilotfish_decode_predicted_seconds_total"
PLAIN = "pilotfish_decode_plain_estimated_seconds_total"
SAME_STEPS = "Of steps that only decode and for which the controller made a prediction."

SUMMARY = Row(
    "The selected time",
    (
        Panel(
            title="Speed-up over plain decoding",
            description="Estimated: the time that plain decoding would have taken for the same tokens, by the "
            f"controller's model of step times, by the time that they took. {SAME_STEPS} pilotfish "
            "bench measures it.",
            unit="suffix:×",
            queries=(Query(ratio(PLAIN, SECONDS, "$__range"), "speed-up"),),
            empty="No decoding",
            kind="number",
            width=6,
            height=5,
            decimals=2,
            steps=((None, RED), (1, YELLOW), (1.1, GREEN)),
        ),
        Panel(
            title="Acceptance",
            description="Share of the drafted tokens that the target agreed with.",
            unit="percentunit",
            queries=(
                Query(
                    ratio("pilotfish_accepted_tokens_total", "pilotfish_drafted_tokens_total", "$__range"), "accepted"
                ),
            ),
            empty="No drafts",
            kind="number",
            width=6,
            height=5,
            decimals=1,
        ),
        Panel(
            title="Mean accepted length",
            description="Tokens that a step added to a decoding sequence, on average: the accepted ones and one "
            "more. Plain decoding has 1.",
            unit="short",
            queries=(
                Query(
                    ratio("pilotfish_sequence_step_tokens_sum", "pilotfish_sequence_step_tokens_count", "$__range"),
                    "tokens",
                ),
            ),
            empty="No decoding",
            kind="number",
            width=6,
            height=5,
            decimals=2,
        ),
        Panel(
            title="Steps with a draft",
            description="Share of the choices, one for each decoding sequence and step, in which the controller "
            "chose to draft.",
            unit="percentunit",
            queries=(
                Query(
                    '1 - (sum(increase(pilotfish_drafter_chosen_total{drafter="none", $i}[$__range])) or vector(0)) '
                    "/ (sum(increase(pilotfish_drafter_chosen_total{$i}[$__range])) > 0)",
                    "drafted",
                ),
            ),
            empty="No decoding",
            kind="number",
            width=6,
            height=5,
            decimals=1,
        ),
    ),
)

GAIN = Row(
    "Does it pay?",
    (
        Panel(
            title="Speed-up over plain decoding (estimated)",
            description="Over time, by server. Below the line at 1, drafting costs time; an alert fires after 10 "
            f"minutes. {SAME_STEPS}",
            unit="suffix:×",
            queries=(Query(ratio(PLAIN, SECONDS, by="instance"), "{{instance}}"),),
            empty=NO_DECODING,
            width=12,
            decimals=2,
            steps=((None, "transparent"), (1, RED)),
        ),
        Panel(
            title="Goodput",
            description="Tokens per second of decoding. measured: by the clock; predicted: what the controller "
            "expected as it chose; plain (estimated): what it expected of decoding without drafts. "
            f"{SAME_STEPS}",
            unit="tokens/s",
            queries=(
                Query(ratio(TOKENS, SECONDS), "measured"),
                Query(ratio(TOKENS, PREDICTED), "predicted"),
                Query(ratio(TOKENS, PLAIN), "plain (estimated)"),
            ),
            empty=NO_DECODING,
            width=12,
            colours={"measured": GREEN, "predicted": BLUE, "plain (estimated)": GREY},
        ),
        Panel(
            title="The controller's error",
            description="How much longer steps took than the controller predicted; below 0, shorter. Far from 0 "
            f"for long, it chooses by a wrong picture of this machine. {SAME_STEPS}",
            unit="percentunit",
            queries=(Query(f"{ratio(SECONDS, PREDICTED)} - 1", "measured against predicted"),),
            empty=NO_DECODING,
            width=12,
            minimum=None,
        ),
        Panel(
            title="Tokens per second of an answer, by drafter",
            description="Median speed of single answers, by the drafter that drafted most for them, and by model.",
            unit="tokens/s",
            queries=(
                Query(
                    "histogram_quantile(0.5, sum by (le, drafter, model) "
                    "(rate(pilotfish_request_decode_tokens_per_second_bucket{$i}[$__rate_interval])))",
                    "{{drafter}} ({{model}})",
                ),
            ),
            empty="No answers in this time range",
            width=12,
        ),
    ),
)

CHOICE = Row(
    "Who drafts",
    (
        Panel(
            title="Drafter chosen",
            description="What the controller chose, as a share of all decoding sequences and steps. none: it "
            "expected no draft to pay.",
            unit="percentunit",
            queries=(
                Query(
                    "sum by (drafter) (rate(pilotfish_drafter_chosen_total{$i}[$__rate_interval])) "
                    "/ on () group_left () (sum(rate(pilotfish_drafter_chosen_total{$i}[$__rate_interval])) > 0)",
                    "{{drafter}}",
                ),
            ),
            empty=NO_DECODING,
            kind="stacked",
            maximum=1,
            colours={"none": GREY},
        ),
        Panel(
            title="Drafted tokens",
            description="Drafted tokens that the target verified, per second, by drafter.",
            unit="tokens/s",
            queries=(
                Query("sum by (drafter) (rate(pilotfish_drafted_tokens_total{$i}[$__rate_interval]))", "{{drafter}}"),
            ),
            empty=NO_DRAFTS,
            kind="stacked",
        ),
        Panel(
            title="Wasted drafts",
            description="Drafted tokens that the target did not agree with, per second, by drafter: rows that were "
            "computed for nothing.",
            unit="tokens/s",
            queries=(
                Query("sum by (drafter) (rate(pilotfish_wasted_tokens_total{$i}[$__rate_interval]))", "{{drafter}}"),
            ),
            empty=NO_DRAFTS,
            kind="stacked",
        ),
    ),
)

ACCEPTANCE = Row(
    "Acceptance",
    (
        Panel(
            title="Acceptance by drafter",
            description="Share of its drafted tokens that the target agreed with.",
            unit="percentunit",
            queries=(
                Query(
                    ratio("pilotfish_accepted_tokens_total", "pilotfish_drafted_tokens_total", by="drafter"),
                    "{{drafter}}",
                ),
            ),
            empty=NO_DRAFTS,
            maximum=1,
        ),
        Panel(
            title="Acceptance by position",
            description="The same by the position in the draft, all drafters together. A token counts as accepted "
            "only if all before it were. Where the lines of late positions are low, shorter drafts do.",
            unit="percentunit",
            queries=(
                Query(
                    ratio(
                        "pilotfish_position_accepted_tokens_total",
                        "pilotfish_position_drafted_tokens_total",
                        by="position",
                    ),
                    "{{position}}",
                ),
            ),
            empty=NO_DRAFTS,
            maximum=1,
        ),
        Panel(
            title="Mean accepted length by drafter",
            description="Tokens that a step added to a decoding sequence, by who drafted for it in that step: the "
            "accepted ones and one more.",
            unit="short",
            queries=(Query(mean("pilotfish_sequence_step_tokens", by="drafter"), "{{drafter}}"),),
            empty=NO_DECODING,
            decimals=1,
        ),
    ),
)

BOARD = Board(
    uid="pilotfish-speculation",
    title="Pilotfish: Speculation",
    description="Whether drafting pays, what the controller chooses, and how much of it the target accepts.",
    rows=(SUMMARY, GAIN, CHOICE, ACCEPTANCE),
)
