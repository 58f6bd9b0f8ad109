# The batch graph: jobs that train networks, and jobs that execute a notebook with papermill. workflow/jobs.py decides
# which are needed and in which order, writes them into a plan, and starts Snakemake on it: `make figures` here, or
#     make figures SCALE=paper SNAKEMAKE='--executor slurm --jobs 50'
# on a cluster, through an executor plugin of Snakemake. Trainings and notebooks ask for gpu=1 if the machine that plans
# has one.
#
# Snakemake deletes the outputs of jobs that fail or are killed, so the outputs it knows are stamps beside the plan, and
# never checkpoints or figures: these are written whole or not at all by companion.runs.store and workflow/batch.py.
import json
import os
import sys
import types
from pathlib import Path

if sys.version_info < (3, 11):
    # Snakemake 7 finds the rule that makes a file with a datrie.Trie, a C extension without wheels for Python 3.10.
    # A dict does for our few rules, and nobody needs a compiler.
    class Trie(dict):
        def __init__(self, alphabet):
            super().__init__()

        def iter_prefix_values(self, text):
            return (value for prefix, value in self.items() if text.startswith(prefix))

    sys.modules["datrie"] = types.SimpleNamespace(Trie=Trie)

# Activations of a megabyte and more come and go with every layer. glibc would hand each back to the system, which then
# has to clear the memory again: up to a fifth of the time of a pass. These keep what is freed.
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
os.environ.setdefault("MALLOC_TOP_PAD_", str(2**26))

if "plan" not in config:
    raise SystemExit("the Snakefile needs a plan: start it with `make figures` or `python workflow/jobs.py`")
PLAN = json.loads(Path(config["plan"]).read_text())
STAMPS = Path(config["plan"]).parent.as_posix()


rule all:
    input:
        [f"{STAMPS}/{key}.done" for key in PLAN["jobs"]],


for number, (key, job) in enumerate(PLAN["jobs"].items()):
    kind, _, subject = key.partition("/")

    rule:
        name:
            f"{kind}_{number}"
        input:
            [f"{STAMPS}/{other}.done" for other in job["after"]],
        output:
            touch(f"{STAMPS}/{key}.done"),
        params:
            stamp=f"{STAMPS}/{key}",
            job=(
                ["-m", "companion.runs.store", "train", *job["runs"]]
                if kind == "train"
                else ["workflow/batch.py", f"notebooks/{subject}.py", "--if-needed", "--scale", PLAN["scale"]]
                + [f"--items={','.join(PLAN['items'])}"]
            ),
        priority: job["priority"]
        resources:
            gpu=PLAN["gpu"],
        shell:
            "touch {params.stamp:q}.started; {sys.executable:q} {params.job:q} || "
            "{{ touch {params.stamp:q}.failed; exit 1; }}"
