"""Exact sequential REPAIR: one pass over all images, against one pass (or one prefix) for every layer."""

from common import arguments, images, network, save, timed

from repairlib.graph import Batches, TracedNet, eval_mode, trace
from repairlib.interpolate import interpolate_models
from repairlib.moments import Moments, gather
from repairlib.renorm import Correction, _correction, _goal, _sequential, target_nodes


def layer_by_layer(net: TracedNet, batches: list, goals: dict, whole: bool) -> dict[str, Correction]:
    """Correct the first layer, run again, correct the second, ...; `whole` runs to the output, else to the layer."""
    corrections: dict[str, Correction] = {}
    with eval_mode(net.model):
        for name, goal in goals.items():
            moments = Moments()
            edits = {node: fix.apply for node, fix in corrections.items()}
            for x in batches:
                for node, value in net.walk(x, [name, net.nodes[-1].name] if whole else [name], edits):
                    if node == name:
                        moments.update(value)
            corrections[name] = _correction(moments.mean(), moments.std(), *goal, moments.dead())
    return corrections


def main() -> None:
    args = arguments(__doc__, number=1000)
    batches, rows = images(args.images), []
    for name in ("vgg16-fused-w1", "resnet20-bn-w1"):
        a, b = (network(name, seed) for seed in (0, 1))
        example = batches[0][:2]
        nets = [trace(model, example) for model in (a, b)]
        targets = target_nodes(nets[0])
        ends, seconds_ends = timed(lambda nets=nets, targets=targets: gather(nets, batches, targets))
        goals = {node: _goal(moments, 0.5) for node, moments in ends.items()}
        mid = interpolate_models(a, b, 0.5)
        net, data = trace(mid, example), Batches(batches, mid)
        ours, seconds = timed(lambda net=net, data=data, goals=goals: _sequential(net, data, goals, False))
        prefix, seconds_prefix = timed(lambda net=net, goals=goals: layer_by_layer(net, batches, goals, False))
        _, seconds_whole = timed(lambda net=net, goals=goals: layer_by_layer(net, batches, goals, True))
        gap = max(float(((ours[n].gain - prefix[n].gain) / prefix[n].gain).abs().max()) for n in goals)
        rows.append(
            {
                "network": name, "layers": len(targets),
                "endpoints' statistics (s)": seconds_ends, "one pass (s)": seconds,
                "layer by layer, prefix (s)": seconds_prefix, "layer by layer, whole network (s)": seconds_whole,
                "ratio to prefix": seconds_prefix / seconds, "ratio to whole network": seconds_whole / seconds,
                "largest relative difference of a gain": gap,
            }
        )  # fmt: skip
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
