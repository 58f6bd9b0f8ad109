"""A path of 11 REPAIRed networks: endpoints' statistics once, against measuring everything anew at every point."""

from common import arguments, images, network, save, timed
from torch import nn

from repairlib.interpolate import interpolate_models
from repairlib.recording import eval_mode
from repairlib.renorm import Goals, Repair

POINTS = 11


def anew(a: nn.Module, b: nn.Module, batches: list, alpha: float, method: str) -> nn.Module:
    """One point as the released code makes it: a pass of A, a pass of B, one of the network between them; fold."""
    recorded = [Goals(model, batches, limit=None).statistics[0] for model in (a, b)]
    goals = Goals(recorded, batches, method=method, limit=None)
    return goals.renormalize(interpolate_models(a, b, alpha), (1 - alpha, alpha)).model


def anew_without_passes(a: nn.Module, b: nn.Module, batches: list, alpha: float, method: str) -> nn.Module:
    """One point of the closed form, which makes no pass of the network: A and B anew."""
    goals = Goals([a, b], batches, method=method, limit=None)
    return goals.renormalize(interpolate_models(a, b, alpha), (1 - alpha, alpha)).model


def main() -> None:
    args = arguments(__doc__, number=400)
    batches, rows = images(args.images), []
    name = "vgg11-fused-w1"
    a, b = (network(name, seed) for seed in (0, 1))
    alphas = [i / (POINTS - 1) for i in range(POINTS)]
    for method in ("sequential", "closed-form"):
        point = anew_without_passes if method == "closed-form" else anew
        repair, seconds = timed(lambda method=method: Repair(a, b, batches, method=method, limit=None))
        seconds_anew, gaps = 0.0, []
        for alpha in alphas:  # taking turns, so that whatever else the machine does slows both
            ours, once = timed(lambda repair=repair, alpha=alpha: repair(alpha).model)
            theirs, again = timed(lambda point=point, alpha=alpha, method=method: point(a, b, batches, alpha, method))
            seconds, seconds_anew = seconds + once, seconds_anew + again
            with eval_mode(ours, theirs):
                x, y = ours(batches[0][:50]), theirs(batches[0][:50])
            gaps.append(float((x - y).abs().max() / y.abs().max()))
        rows.append(
            {
                "network": name, "method": method, "points": POINTS,
                "statistics of the endpoints once (s)": seconds, "everything at every point (s)": seconds_anew,
                "ratio": seconds_anew / seconds, "largest relative difference of an output": max(gaps),
            }
        )  # fmt: skip
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
