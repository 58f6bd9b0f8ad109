"""Activation matching: one streaming pass in float32 against layer by layer in float64, re-running the prefix."""

import torch
from common import arguments, images, network, save, timed

from repairlib.groups import permutation_spec
from repairlib.matching import match_activations, solve_assignment
from repairlib.recording import eval_mode
from repairlib.tracing import TracedNet, trace


def float64_correlation(net_a: TracedNet, net_b: TracedNet, batches: list, tap: str) -> torch.Tensor:
    """Pearson correlation at one tap from sums in float64; the networks run from the input to the tap, once a tap."""
    count, sums, squares, cross = 0, [0.0, 0.0], [0.0, 0.0], 0.0
    with eval_mode(net_a.model, net_b.model):
        for x in batches:
            rows = []
            for net in (net_a, net_b):
                ((_, value),) = net.walk(x, [tap])  # stops at the tap
                rows.append(value.transpose(0, 1).flatten(1).double())
            count += rows[0].shape[1]
            for k, r in enumerate(rows):
                sums[k] += r.sum(1)
                squares[k] += (r * r).sum(1)
            cross += rows[0] @ rows[1].T
    mean = [s / count for s in sums]
    std = [(q / count - m**2).clamp_min(0).sqrt() for q, m in zip(squares, mean, strict=True)]
    corr = (cross / count - torch.outer(*mean)) / torch.outer(*std)
    return torch.nan_to_num(corr, 0.0, 0.0, 0.0)


def main() -> None:
    args = arguments(__doc__, number=2000)
    batches, rows = images(args.images), []
    for name in ("resnet20-bn-w1", "vgg16-bn-w1"):
        nets = [trace(network(name, seed), batches[0][:2]) for seed in (0, 1)]
        spec = permutation_spec(nets[0].model, batches[0][:2])
        taps = [group.taps["post"] for group in spec.groups]

        def one_pass(nets=nets, spec=spec):
            return match_activations(nets[0].model, nets[1].model, batches, spec=spec)

        def layer_by_layer(nets=nets, taps=taps):
            corrs = [float64_correlation(*nets, batches, tap) for tap in taps]
            return corrs, [solve_assignment(corr) for corr in corrs]

        matching, ours = timed(one_pass)
        (corrs, perms), theirs = timed(layer_by_layer)
        # Both assignments are judged by the float64 correlations.
        score = [float(corr[torch.arange(len(p)), p].sum()) for corr, p in zip(corrs, perms, strict=True)]
        mine = [matching.permutation[group.name] for group in spec.groups]
        our_score = [float(corr[torch.arange(len(p)), p].sum()) for corr, p in zip(corrs, mine, strict=True)]
        same = sum(bool((p == q).all()) for p, q in zip(perms, mine, strict=True))
        rows.append(
            {
                "network": name, "layers": len(taps), "one pass (s)": ours, "layer by layer (s)": theirs,
                "ratio": theirs / ours,
                "objective, one pass": sum(our_score), "objective, layer by layer": sum(score),
                "layers with the same assignment": same,
            }
        )  # fmt: skip
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
