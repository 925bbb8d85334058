"""How much slower one recipe is than another, and how sure that is: runs differ by node and from try to try."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Of every interval, two-sided."""

NODE_EFFECT = 0.08
"""By which the times of two nodes with the same GPUs differ (arXiv 2208.11035: 8 % on average, 22 % at most)."""

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for 1 to 30 degrees of freedom at a probability of 0.975.

Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2."""
T_975_BEYOND = 2.042
"""For more than 30: the last of the table, which is a little too wide."""


@dataclass(frozen=True)
class Repeat:
    """One completed run of a configuration."""

    node: str
    seconds: float
    """Any positive quantity that is compared by its ratio."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two quantities with its interval; a bound that the runs can't give is None."""

    value: float
    low: float | None
    high: float | None
    freedom: int = 0
    """Degrees of freedom that the interval rests on."""

    @property
    def leaves_out_one(self) -> bool:
        """Whether the two differ by more than chance and nodes explain."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    @property
    def bounded(self) -> bool:
        return self.low is not None


def ratio(numerator: list[Repeat], denominator: list[Repeat], node_effect: float = NODE_EFFECT) -> Ratio:
    """The ratio of two sets of repeats with its interval of 95 %, by the logarithms of the repeats.

    Where both were measured on the same two or more nodes, what a node does to both is taken out (least squares with
    one term for each node). Otherwise a node is the unit: the interval is Welch's over the means of the nodes, which
    are taken to scatter as nodes do at least: two that happen to be alike say little of the others. Where every run of
    one was on one node and the other's were elsewhere, no interval can be given: the difference may be the node's.

    Args:
        numerator: repeats of one configuration, at least one.
        denominator: repeats of the other, at least one.
        node_effect: by which two nodes are taken to differ; 0 for what does not depend on the node, as memory.
    """
    above, below = _by_node(numerator), _by_node(denominator)
    if len(above.keys() & below.keys()) >= 2:
        return _within_nodes(above, below)
    return _between_nodes(above, below, math.log(1 + node_effect) ** 2 / 2)


def _by_node(repeats: list[Repeat]) -> dict[str, list[float]]:
    nodes: dict[str, list[float]] = {}
    for one in repeats:
        nodes.setdefault(one.node, []).append(math.log(one.seconds))
    return nodes


def _within_nodes(above: Mapping[str, list[float]], below: Mapping[str, list[float]]) -> Ratio:
    """Least squares of log y = node + b * (is numerator): Frisch-Waugh, all quantities centred on their node."""
    pairs: list[tuple[float, float]] = []
    nodes = {**above, **below}  # in their order, so that the same runs always give the same digits
    for node in nodes:
        runs = [(1.0, y) for y in above.get(node, [])] + [(0.0, y) for y in below.get(node, [])]
        mean_x, mean_y = statistics.fmean(x for x, _ in runs), statistics.fmean(y for _, y in runs)
        pairs += [(x - mean_x, y - mean_y) for x, y in runs]
    square = sum(x * x for x, _ in pairs)
    slope = sum(x * y for x, y in pairs) / square
    freedom = len(pairs) - len(nodes) - 1
    residual = sum((y - slope * x) ** 2 for x, y in pairs)
    if freedom < 1:
        return Ratio(math.exp(slope), None, None)
    return _interval(slope, math.sqrt(residual / freedom / square), freedom)


def _between_nodes(above: Mapping[str, list[float]], below: Mapping[str, list[float]], least: float) -> Ratio:
    """`least` is the smallest variance of a node's mean that is believed."""
    first, second = ([statistics.fmean(values) for values in nodes.values()] for nodes in (above, below))
    means = statistics.fmean(first), statistics.fmean(second)
    difference = means[0] - means[1]
    if min(len(first), len(second)) < 2:
        return Ratio(math.exp(difference), None, None)
    # Not statistics.variance: its exact fractions take a hundred times as long, and there are a million ratios.
    parts = [
        max(sum((value - mean) ** 2 for value in values) / (len(values) - 1), least) / len(values)
        for values, mean in zip((first, second), means, strict=True)
    ]
    total = sum(parts)
    smallest = min(len(first), len(second)) - 1
    # Welch-Satterthwaite; rounded down, so that the interval is rather too wide.
    freedom = total**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (first, second), strict=True)) if total else 0
    return _interval(difference, math.sqrt(total), max(smallest, int(freedom)))


def _interval(logarithm: float, error: float, freedom: int) -> Ratio:
    t = student(freedom)
    value, low, high = (math.exp(logarithm + shift * t * error) for shift in (0, -1, 1))
    return Ratio(value, low, high, freedom)


def student(freedom: int) -> float:
    """Student's t of a two-sided interval of 95 %, for one degree of freedom or more."""
    return T_975[freedom - 1] if freedom <= len(T_975) else T_975_BEYOND
