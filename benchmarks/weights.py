"""Weight matching of ResNet20 w4: products kept between sweeps, against Algorithm 1 written down directly."""

import torch
from common import arguments, network, save, timed
from torch import Tensor

from repairlib.groups import PermutationSpec, permutation_spec
from repairlib.matching import solve_assignment
from repairlib.weight_matching import match_weights


def permuted(tensor: Tensor, places: list, permutation: dict, but: int | None) -> Tensor:
    """One tensor of B with every axis permuted but one."""
    for group, axis in places:
        if axis != but:
            tensor = torch.index_select(tensor, axis, permutation[group])
    return tensor


def transcription(state_a: dict, state_b: dict, spec: PermutationSpec, seed: int, sweeps: int = 100) -> tuple:
    """Ainsworth et al. 2022, Algorithm 1: each tensor permuted, reshaped and multiplied whole, every sweep."""
    generator = torch.Generator().manual_seed(seed)
    permutation = {g.name: torch.arange(g.size) for g in spec.groups}
    axes = {g.name: [(a.tensor, a.axis) for a in g.axes if a.tensor in state_a] for g in spec.groups}
    places: dict[str, list] = {}
    for group, its in axes.items():
        for tensor, axis in its:
            places.setdefault(tensor, []).append((group, axis))
    names, sweep = list(axes), 0
    while sweep < sweeps:
        sweep += 1
        progress = False
        for i in torch.randperm(len(names), generator=generator).tolist():
            name = names[i]
            n = len(permutation[name])
            cost = torch.zeros(n, n)
            for tensor, axis in axes[name]:
                w_a = state_a[tensor].movedim(axis, 0).reshape(n, -1)
                w_b = permuted(state_b[tensor], places[tensor], permutation, axis).movedim(axis, 0).reshape(n, -1)
                cost += w_a @ w_b.T
            new = solve_assignment(cost)
            at = torch.arange(n)
            old_value, new_value = cost[at, permutation[name]].sum(), cost[at, new].sum()
            progress = progress or bool(new_value > old_value + 1e-12)
            permutation[name] = new
        if not progress:
            break
    objective = sum(
        float((state_a[t].double() * permuted(state_b[t], p, permutation, None).double()).sum())
        for t, p in places.items()
    )
    return permutation, objective, sweep


def main() -> None:
    args = arguments(__doc__, number=250)
    rows = []
    for name in ("resnet20-bn-w1", "resnet20-bn-w4", "vgg16-bn-w1"):
        a, b = (network(name, seed) for seed in (0, 1))
        spec = permutation_spec(a, torch.zeros(2, 3, 32, 32))
        states = [{n: p.detach() for n, p in model.named_parameters()} for model in (a, b)]
        for seed in range(3):
            found, ours = timed(
                lambda a=a, b=b, spec=spec, seed=seed: match_weights(a, b, spec=spec, start="identity", seed=seed)
            )
            (_, objective, sweeps), theirs = timed(
                lambda states=states, spec=spec, seed=seed: transcription(*states, spec, seed)
            )
            rows.append(
                {
                    "network": name, "seed": seed, "ours (s)": ours, "Algorithm 1 as written (s)": theirs,
                    "ratio": theirs / ours, "objective, ours": found.history[-1], "objective, as written": objective,
                    "sweeps, ours": len(found.history) - 1, "sweeps, as written": sweeps,
                }
            )  # fmt: skip
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
