"""Exact sequential REPAIR: one pass over all images, against one pass (or one prefix) for every layer."""

from functools import partial

from common import arguments, images, network, save, timed

from repairlib.corrections import Correction, correct_moments
from repairlib.inputs import Batches
from repairlib.interpolate import interpolate_models
from repairlib.moments import Moments
from repairlib.recording import eval_mode
from repairlib.renorm import Repair, _sequential
from repairlib.tracing import TracedNet, trace


def layer_by_layer(net: TracedNet, batches: list, rules: dict, whole: bool) -> dict[str, Correction]:
    """Correct the first layer, run again, correct the second, ...; `whole` runs to the output, else to the layer."""
    corrections: dict[str, Correction] = {}
    with eval_mode(net.model):
        for name, rule in rules.items():
            moments = Moments()
            edits = {node: fix.apply for node, fix in corrections.items()}
            for x in batches:
                for node, value in net.walk(x, [name, net.nodes[-1].name] if whole else [name], edits):
                    if node == name:
                        moments.update(value)
            corrections[name] = rule(moments)
    return corrections


def main() -> None:
    args = arguments(__doc__, number=1000)
    batches, rows = images(args.images), []
    for name in ("vgg16-fused-w1", "resnet20-bn-w1"):
        a, b = (network(name, seed) for seed in (0, 1))
        example = batches[0][:2]
        repair, seconds_ends = timed(lambda a=a, b=b: Repair(a, b, batches, limit=None))
        rules = {
            node: partial(correct_moments, goal_mean=mean, goal_std=std) for node, (mean, std) in repair.at(0.5).items()
        }
        mid = interpolate_models(a, b, 0.5)
        net, data = trace(mid, example), Batches(batches, mid)
        (ours, _), seconds = timed(lambda net=net, data=data, rules=rules: _sequential(net, data, rules, False))
        prefix, seconds_prefix = timed(lambda net=net, rules=rules: layer_by_layer(net, batches, rules, False))
        _, seconds_whole = timed(lambda net=net, rules=rules: layer_by_layer(net, batches, rules, True))
        gap = max(float(((ours[n].gain - prefix[n].gain) / prefix[n].gain).abs().max()) for n in rules)
        rows.append(
            {
                "network": name, "layers": len(rules),
                "endpoints' statistics (s)": seconds_ends, "one pass (s)": seconds,
                "layer by layer, prefix (s)": seconds_prefix, "layer by layer, whole network (s)": seconds_whole,
                "ratio to prefix": seconds_prefix / seconds, "ratio to whole network": seconds_whole / seconds,
                "largest relative difference of a gain": gap,
            }
        )  # fmt: skip
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
