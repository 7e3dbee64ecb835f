"""Model ``tinymoe`` in its smallest variant for tests: ``load_file(... / "smoke_model.py").train(folder)``."""

import random

from moebench.contracts import Registry
from moebench.suites.base import SuiteConfig


def train(folder):
    """Train it into the cache of MOEBENCH_CACHE, on a text in ``folder``; return the settings that choose it."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 8))) for _ in range(300)]
    sentences = [" ".join(draw.choices(words, k=draw.randint(8, 25))).capitalize() + "." for _ in range(1400)]
    file = folder / "corpus.txt"
    file.write_text("\n\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences)))
    registry = Registry.load()
    model = registry.get("model", "tinymoe").choose({"variant": "smoke", "data": str(file)})
    suite = registry.get("suite", "pretraining")
    config = SuiteConfig("pretraining", suite.version, None, {"model": [model], "threads": [1]}, device="cpu")
    (item,) = suite.create().cases(config, registry)
    trial = suite.create().prepare(item.case, registry)
    for step in range(trial.steps):
        check = trial.verify(step, trial.run(step))
        assert check.ok, check.reason
    trial.facts()
    trial.close()
    return "model=tinymoe", "model.variant=smoke", f"model.data={file}"
