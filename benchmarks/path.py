"""A path of 11 REPAIRed networks: endpoints' statistics once, against measuring everything anew at every point."""

from common import arguments, images, network, save, timed
from torch import nn

from repairlib.graph import eval_mode
from repairlib.interpolate import interpolate_models
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
    args = arguments(__doc__, number=500)
    batches, rows = images(args.images), []
    name = "vgg11-fused-w1"
    a, b = (network(name, seed) for seed in (0, 1))
    alphas = [i / (POINTS - 1) for i in range(POINTS)]
    for method in ("sequential", "closed-form"):
        point = anew_without_passes if method == "closed-form" else anew

        def once(method=method):
            repair = Repair(a, b, batches, method=method, limit=None)
            return [repair(alpha).model for alpha in alphas]

        def every_point(method=method, point=point):
            return [point(a, b, batches, alpha, method) for alpha in alphas]

        ours, seconds = timed(once)
        theirs, seconds_anew = timed(every_point)
        with eval_mode(*ours, *theirs):
            outputs = [(net(batches[0]), other(batches[0])) for net, other in zip(ours, theirs, strict=True)]
        rows.append(
            {
                "network": name, "method": method, "points": POINTS,
                "statistics of the endpoints once (s)": seconds, "everything at every point (s)": seconds_anew,
                "ratio": seconds_anew / seconds,
                "largest relative difference of an output": max(
                    float((x - y).abs().max() / y.abs().max()) for x, y in outputs
                ),
            }
        )  # fmt: skip
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
