"""Deletes one check of the run folder, of resume or of the training's commits at a time, and expects a test to fail.

    python tests/mutants.py [--name PART_OF_A_NAME]

Works on a copy of the tree in a temporary folder, with the fast tests alone, which must pass without any mutant.
Prints `mutants killed: k/k`. Of the C++ side: csrc/tests/mutants.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds; a mutant that hangs is noticed, too


class Mutant(NamedTuple):
    name: str
    file: str
    text: str  # occurs once
    instead: str
    tests: str


def of(file: str, tests: str, *mutants: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(f"{file}: {name}", f"nf_engine/{file}", text, instead, tests) for name, text, instead in mutants]


FOLDER = "tests/test_run_folder.py tests/test_paths.py tests/test_state_machine.py tests/test_commit_faults.py"
RESUME = "tests/test_resume.py"
DAMAGE = "tests/test_damage.py::test_"
CHECKPOINTS = (
    f"{DAMAGE}each_dtype_claimed_as_each_other_is_refused {DAMAGE}each_wrong_shape_is_refused "
    f"{DAMAGE}a_training_state_that_is_not_the_models_is_refused tests/test_hostile.py "
    f"{DAMAGE}a_key_that_is_there_twice_is_refused {DAMAGE}scores_that_are_not_two_numbers_a_unit_are_refused"
)
CACHES = "tests/test_stale_caches.py"
NUMBERS = "tests/test_guards.py -k number_that"
LOST = "tests/test_guards.py -k device"

MUTANTS = [
    *of(
        "manifest.py",
        "tests/test_manifest.py",
        ("length", "if len(data) > LIMIT:", "if False:"),
        ("seal is there", "if not found:", "if False:"),
        ("digest of itself", 'if digest_of(body) != found[1].decode("ascii"):', "if False:"),
        ("equal keys", "if len(made) != len(pairs):", "if False:"),
        ("format", 'if value.get("format") != FORMAT:', "if False:"),
        ("canonical", "if manifest.to_bytes() != data:", "if False:"),
        ("name of a role", " or not re.fullmatch(ROLES[entry.role], entry.name, re.ASCII):", ":"),
        ("role", "if entry.role not in ROLES or not", "if not"),
        ("digest of a file", "if not DIGEST.fullmatch(entry.sha256):", "if False:"),
        ("range of numbers", "if not 0 <= number < MOST:", "if False:"),
        ("order and repetition", "if names != sorted(set(names)) or len", "if len"),
        ("number of files", "or len(names) > MOST_FILES:", ":"),
        ("first generation", "if self.generation < 1:", "if False:"),
        ("run_id", "if not RUN_ID.fullmatch(self.run_id):", "if False:"),
        (
            "control characters",
            "if not all(text.isprintable() for pair in self.env.items() for text in pair):",
            "if False:",
        ),
        ("digests of the run", "if not DIGEST.fullmatch(value) and not (", "if False and not ("),
    ),
    *of(
        "folder_files.py",
        FOLDER,
        ("owner of the folder", "if status.owner != os.geteuid():", "if False:"),
        ("others may write", "if status.mode & 0o022:", "if False:"),
        ("kind of a file", "if not status.regular or status.links", "if status.links"),
        ("hard links", "status.links != 1 or ", ""),
        (
            "owner of a file",
            " or status.owner != os.geteuid():\n        kind",
            ":\n        kind",
        ),
        ("length of a file", "if size > most and not start:", "if False:"),
    ),
    *of(
        "committed.py",
        FOLDER,
        ("digest of a file", " or digest_of(data) != entry.sha256:", ":"),
        ("what the present commit followed", "if digest_of(data) != now.prev_sha256:", "if False:"),
        ("files of the commit before", '                if entry.role != "cache":\n', "                if False:\n"),
    ),
    *of(
        "run_folder.py",
        FOLDER,
        ("folder of somebody else", "            _check_unused(self.files, self.path)\n", ""),
        (
            "sweep: foreign names",
            "if is_ours(name) and status.regular:\n                self.files.unlink",
            "if status.regular:\n                self.files.unlink",
        ),
        (
            "sweep: links",
            "if is_ours(name) and status.regular:\n                self.files.unlink",
            "if is_ours(name):\n                self.files.unlink",
        ),
        ("sweep at all", "            self.strangers = self._sweep()\n", "            self.strangers = []\n"),
        (
            "sweep: the commit before",
            "kept = FIXED | _listed(self.manifest) | _durable(self._previous())",
            "kept = FIXED | _listed(self.manifest)",
        ),
        ("a manifest that is gone", "if PREVIOUS in names:\n            raise", "if False:\n            raise"),
        ("tail of the metrics", "if file.stat().size > len(data):", "if False:"),
        ("condemned", "        if self._condemned is not None:\n            raise self._condemned\n", ""),
        ("a rename is a commit", "published = True  #", "published = False  #"),
        ("ballast", "or not self.drop_ballast():", "or True:"),
        ("fsync that failed is never asked again", 'if error.op != "fsync":', "if True:"),
        ("clean-up keeps the commit before", "_listed(self.manifest) | _durable(before)", "_listed(self.manifest)"),
        ("clean-up at all", "        self._clean(before)\n", ""),
        (
            "clean-up after an error",
            "                self._remove_quietly(name)\n            raise\n        before",
            "                pass\n            raise\n        before",
        ),
    ),
    *of(
        "checkpoint.py",
        CHECKPOINTS,
        ("keys", "if missing or unknown:", "if False:"),
        ("shape and dtype", "if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):", "if False:"),
        ("equal keys", "if len(set(keys)) != len(keys):", "if False:"),
        (
            "scores",
            "if scores is None or scores.shape != (units, 2) or scores.dtype != torch.float64:",
            "if scores is None:",
        ),
    ),
    *of("checkpoint.py", NUMBERS, ("finite", "if bool(flags.all()):", "if True:")),
    *of(
        "resume.py",
        RESUME,
        ("settings", "if now.config_sha256 != config_sha256(config, cut):", "if False:"),
        ("a setting that is not neutral", '"max_drop", "pinned_bytes")', '"max_drop", "pinned_bytes", "seed")'),
        ("network", ", *code))", "))"),
        ("images", "if now.data_sha256 != data_sha256:", "if False:"),
        ("software", "if differences and not allow_inexact and not now.done:", "if False:"),
        ("leave to be inexact", "if differences and not allow_inexact and", "if differences and"),
        ("plan", "    if differences:\n", "    if False:\n"),
    ),
    *of(
        "engine.py",
        RESUME,
        ("must", 'if resume == "must" and not', "if False and not"),
        ("never", 'if folder.manifest is not None and resume == "never":', "if False:"),
        (
            "a plan given again",
            "                check_plan(folder, made, given_plan(plan, cut, settings, len(data), device))\n",
            "                pass\n",
        ),
    ),
    *of(
        "run_caches.py",
        f"{CACHES} -k each_input",
        ("fingerprint: settings", '            "config": now.config_sha256,\n', ""),
        ("fingerprint: images", '            "data": now.data_sha256,\n', ""),
        ("fingerprint: software", '            "env": now.env,\n', ""),
        ("fingerprint: units", '(asdict(b)["units"], b.batch, b.lr)', "(b.batch, b.lr)"),
        ("fingerprint: batches", '(asdict(b)["units"], b.batch, b.lr)', '(asdict(b)["units"], b.lr)'),
        ("fingerprint: learning rates", '(asdict(b)["units"], b.batch, b.lr)', '(asdict(b)["units"], b.batch)'),
        ("fingerprint: weights", 'now.of_role("block") if e.block < number]', 'now.of_role("block") if e.block < 0]'),
    ),
    *of(
        "chain.py",
        CACHES,
        ("digest of a cache", "table_sha256=entries[prefix].sha256", 'table_sha256=""'),
        ("a cache that is gone", '!= "disk" or len(entries) < 2:', '!= "disk":'),
        ("rows computed again", "                self._check_rows(number, prefix, opened[-1])\n", ""),
        ("a cache that cannot be opened", "except (CacheError, StorageError) as error:", "except CacheError as error:"),
    ),
    *of(
        "controller.py",
        f"{CACHES} -k corrupts",
        ("one rebuild", "if now in made_again:\n", "if False:\n"),
        (
            "lines that do not count",
            "                    job.folder.cut_metrics()  # first",
            "                    # first",
        ),
    ),
    *of("controller.py", NUMBERS, ("finite block", '        check_finite(state, f"block {number}")\n', "")),
    *of("controller.py", RESUME, ("cut in scoring", "            self._trainer.commit_end(number, units)\n", "")),
    *of(
        "trainer.py",
        NUMBERS,
        ("finite state", '        check_finite(state, f"block {number}, epoch {epoch}, step {step}")\n', ""),
    ),
    *of(
        "trainer.py",
        "tests/test_guards.py -k 'device and copy'",
        ("every few minutes", "if (due or job.interrupt.reason) and", "if job.interrupt.reason and"),
    ),
    *of(
        "trainer.py",
        RESUME,
        ("commit where a run is cut", "if (due or job.interrupt.reason) and", "if due and"),
        ("end where a run is cut", "            job.interrupt.check()\n\n        def report", "\n        def report"),
        ("state of the last commit", "if now.position <= Position(number):", "if True:"),
    ),
    *of(
        "worker.py",
        RESUME,
        ("first epoch", "for epoch in range(start.epoch, config.epochs):", "for epoch in range(config.epochs):"),
        ("first step", "first = start.step if epoch == start.epoch else 0", "first = 0"),
        ("losses so far", "            losses.copy_(start.losses)\n", "            pass\n"),
        ("randomness of a step", "    torch.default_generator.manual_seed(key)\n", ""),
    ),
    *of(
        "worker.py",
        NUMBERS,
        (
            "loss of a step",
            "                    _check_losses(losses.tolist(), units, plan, block, epoch, step - 1)\n",
            "                    pass\n",
        ),
        (
            "count of a batch that fails",
            "with closing(watched(inputs.train(epoch, plan.batch, first), counted)) as source:",
            "for source in [watched(inputs.train(epoch, plan.batch, first), counted)]:",
        ),
        ("loss of an epoch", "        _check_losses(means, units, plan, block, epoch, per_epoch - 1)\n", ""),
    ),
    *of(
        "worker.py",
        LOST,
        (
            "count of a step that fails",
            "with closing(batches(epoch, first)) as source:",
            "for source in [batches(epoch, first)]:",
        ),
    ),
    *of(
        "recovery.py",
        LOST,
        ("lost device", "except torch.AcceleratorError as error:", "except ZeroDivisionError as error:"),
        ("out of memory is none", "        if is_out_of_memory(error):\n            raise\n", ""),
    ),
]


def failure(tree: Path, tests: str) -> str:
    """What pytest says where a test fails, or none of them ends in time; "" where all pass."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NF_")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            [*command, *shlex.split(tests)],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {LIMIT} s"
    if ended.returncode not in (0, 1):
        raise SystemExit(f"{tests}: pytest ended with {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return ended.stdout if ended.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="", help="only mutants whose name holds this")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if arguments.name in mutant.name]
    for mutant in mutants:
        times = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.text)
        if times != 1:
            raise SystemExit(f"{mutant.name}: expected the text once in {mutant.file}, found it {times} times")
    with tempfile.TemporaryDirectory(prefix="nf-mutants-") as scratch:
        tree = Path(scratch)
        tree.chmod(0o755)  # some tests run as another user
        for name in ("nf_engine", "tests", "pyproject.toml", "README.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, tree / name)
        for tests in sorted({mutant.tests for mutant in mutants}):
            if found := failure(tree, tests):
                raise SystemExit(f"{found}{tests}: fails without any mutant")
        count = 0
        for mutant in mutants:
            file = tree / mutant.file
            sound = file.read_text(encoding="utf-8")
            file.write_text(sound.replace(mutant.text, mutant.instead), encoding="utf-8")
            killed = failure(tree, mutant.tests) != ""
            file.write_text(sound, encoding="utf-8")
            count += killed
            print(f"{'killed' if killed else 'SURVIVED'}: {mutant.name}", flush=True)
    print(f"mutants killed: {count}/{len(mutants)}")
    return 0 if count == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
