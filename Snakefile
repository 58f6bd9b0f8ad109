# The batch graph: one job for every training run, one papermill job for every notebook. `make figures` runs it here;
# a cluster runs it through an executor plugin of Snakemake, for instance
#     .venv/bin/snakemake --executor slurm --jobs 50 --config scale=paper
# where training runs and notebooks ask for gpu=1 if the machine that plans has one. Configuration: scale, notebooks,
# items, as of `make figures`.
#
# Snakemake deletes the outputs of jobs that fail or are killed, so the outputs it knows are stamps in build/, and never
# checkpoints or figures: these are written whole or not at all by companion.runs.store and workflow/batch.py.
import shutil
import sys
import types
import zlib
from pathlib import Path

sys.path[:0] = [workflow.basedir, f"{workflow.basedir}/workflow"]
import batch

from companion.experiments import scales

if sys.version_info < (3, 11):
    # Snakemake 7 finds the rule that makes a file with a datrie.Trie, a C extension without wheels for Python 3.10.
    # A dict does for our few rules, and nobody needs a compiler.
    class Trie(dict):
        def __init__(self, alphabet):
            super().__init__()

        def iter_prefix_values(self, text):
            return (value for prefix, value in self.items() if text.startswith(prefix))

    sys.modules["datrie"] = types.SimpleNamespace(Trie=Trie)

try:
    SCALE = scales.check_scale(config.get("scale", "quick"))
    ITEMS, NEEDS = batch.find_needs(SCALE, str(config.get("notebooks", "")), str(config.get("items", "")))
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)  # also when Snakemake is told to be quiet
    raise

# A run for some items has a stamp of its own, since it does not complete the notebook.
SOME = f"+{zlib.crc32(repr(ITEMS).encode()):08x}" if ITEMS else ""
STAMP = f"build/{SCALE}/{{notebook}}{SOME}.done"
LIBRARY = [path for folder in ("repairlib", "companion") for path in Path(folder).rglob("*.py")]
LIBRARY = [path.as_posix() for path in LIBRARY if path.name != "store.py"]
GPU = 1 if shutil.which("nvidia-smi") else 0

for name in NEEDS:
    if not batch.read_done(name, SCALE):  # somebody removed figures: make them again
        for stamp in [*Path("build", SCALE).glob(f"{name}.done"), *Path("build", SCALE).glob(f"{name}+*.done")]:
            stamp.unlink()


rule all:
    input:
        expand(STAMP, notebook=list(NEEDS)),


# One job for every run; at the small scales for all seeds of a network, as starting a job takes longer than some of the
# trainings. Only runs that are missing get a rule, so that a stamp is never written again.
jobs: dict[str, list[str]] = {}
for run in dict.fromkeys(run for need in NEEDS.values() for run in need["runs"]):
    if not Path("build/runs", f"{run}.done").exists():
        jobs.setdefault(run.rpartition("/")[0] if SCALE in ("smoke", "quick") else run, []).append(run)

for runs in jobs.values():

    rule:
        output:
            touch(expand("build/runs/{run}.done", run=runs)),
        params:
            runs=runs,
        resources:
            gpu=GPU,
        shell:  # through cat, because the progress bars of parallel jobs would overwrite each other
            "{sys.executable:q} -m companion.runs.store train {params.runs:q} | cat"


rule notebook:
    input:
        lambda wildcards: expand("build/runs/{run}.done", run=NEEDS[wildcards.notebook]["runs"]),
        lambda wildcards: expand(STAMP, notebook=NEEDS[wildcards.notebook]["after"]),
        LIBRARY,
        notebook="notebooks/{notebook}.py",
    output:
        touch(STAMP),
    params:
        only=",".join(ITEMS),
    resources:
        gpu=GPU,
    shell:
        "{sys.executable:q} workflow/batch.py {input.notebook:q} --scale {SCALE} --items={params.only:q}"


onstart:
    runs = sum(map(len, jobs.values()))
    print(f"{SCALE}: networks to train: {runs}; notebooks that may need them: {len(NEEDS)}", flush=True)
