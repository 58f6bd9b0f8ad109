"""Where weight matching starts: at the identity, once or five times, or forward from the inputs.

Objectives of networks with random weights, and of the networks of `make figures` at quick: mean over three pairs of
seeds, with the test accuracy (%) of the midpoint and of its REPAIR.
"""

import argparse
import itertools
import time

import torch
from common import save

import repairlib
from companion.experiments.pairs import load_pair
from companion.runs import models
from repairlib.groups import permutation_spec
from repairlib.weight_matching import match_weights

STARTS: dict[str, dict] = {
    "identity": {"start": "identity"},
    "identity, 5 descents": {"start": "identity", "restarts": 5},
    "forward": {"start": "forward"},
}
RANDOM = {"mlp10-plain-w512": (1, 28, 28), "vgg11-plain-w1": (3, 32, 32), "vgg16-plain-w1": (3, 32, 32)}
TRAINED = (
    "digits/mlp10-fused-w128/quick", "digits-hard/mlp10-fused-w128/quick", "digits/vgg11-fused-w0.25/quick",
    "digits-hard/vgg11-plain-w0.25/quick~lr0.03~wd1e-4", "digits-hard/vgg11-bn-w0.25/quick~wd1e-4",
    "digits-hard/vgg11-ln-w0.25/quick", "digits-hard/resnet8-plain-w1/quick", "digits-hard/resnet8-bn-w1/quick",
    "digits-hard/resnet8-ln-w1/quick", "digits/resnet18-bn-w0.25/quick", "digits/resnet20-bn-w0.75/quick",
    "digits-hard/tiny10-ln-w2/quick-csiszarik",
)  # fmt: skip


def of_random(name: str) -> list[dict]:
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(models.build(name, shape=RANDOM[name], classes=10).eval())
    spec = permutation_spec(nets[0], torch.zeros(2, *RANDOM[name]), verify=False)
    rows = []
    for start, how in STARTS.items():
        began = time.process_time()
        found = match_weights(*nets, spec=spec, **how)
        rows.append({"network": f"{name}, random weights", "start": start, "objective": found.history[-1],
                     "sweeps": len(found.history) - 1, "CPU seconds": time.process_time() - began})  # fmt: skip
    return rows


def of_trained(run: str) -> list[dict]:
    pairs = [load_pair([f"{run}/s{i}", f"{run}/s{j}"], 500) for i, j in itertools.combinations((1, 2, 3), 2)]
    spec = permutation_spec(pairs[0].a, next(iter(pairs[0].calibration))[0][:2], verify=False)
    rows = []
    for start, how in STARTS.items():
        values = []
        for pair in pairs:
            found = match_weights(pair.a, pair.b, spec=spec, **how)
            b = found.apply(pair.b)
            middle = repairlib.interpolate_models(pair.a, b)
            repaired = repairlib.repair(pair.a, b, pair.calibration).model
            accuracies = [100 * pair.evaluate(model)[1] for model in (middle, repaired)]
            values.append([found.history[-1], len(found.history) - 1, *accuracies])
        objective, sweeps, middle, repaired = torch.tensor(values).mean(0).tolist()
        rows.append({"network": run, "start": start, "objective": objective, "sweeps": sweeps,
                     "midpoint": middle, "with REPAIR": repaired})  # fmt: skip
    return rows


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    rows = [row for name in RANDOM for row in of_random(name)]
    save(__file__, args, rows + [row for run in TRAINED for row in of_trained(run)])


if __name__ == "__main__":
    main()
