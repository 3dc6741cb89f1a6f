"""Which stages a run has, before it begins: what its progress counts to."""

from lensbench.run.curves import has_curve
from lensbench.run.further_scores import asked_for
from lensbench.suite.recipes import ModelRecipe, Suite


def stage_names(suite: Suite, models: list[ModelRecipe], probes: tuple[str, ...] = ()) -> set[str]:
    """The names of all stages of these models; of the suite's probes ``probes`` alone, all of them where it is empty."""
    names = set()
    for model in models:
        owner = suite.trained(model)
        seeds = suite.seeds_of(model)
        if seeds:
            names.add("baselines" if owner.source is None else f"baselines-{owner.name}")
        if seeds and owner.source is None and suite.images is None:
            names.add("tokenizer")
        if seeds and owner.source is not None and suite.images is None:
            names.add(f"begin-{owner.name}")
        for seed in seeds:
            who = f"{model.name}-seed{seed}"
            names |= {f"fit-{who}", f"score-{who}"}
            names |= {f"probe-{name}-{who}" for name in probes or suite.probes}
            if owner.source is None:
                names.add(f"train-{suite.whole_training(owner).name}-seed{seed}")
            names |= {f"{what}-{who}" for what in asked_for(suite)}
            if suite.update is not None:
                names.add(f"update-{who}")
            if suite.evaluate.precision is not None:
                names.add(f"plan-{who}")
            if suite.evaluate.exact_share == "auto":
                names.add(f"share-{who}")
            if suite.curve is not None and has_curve(suite, model):
                budgets = {*suite.curve.budgets, suite.training.tokens}
                names |= {f"curve-{who}-{tokens}" for tokens in budgets}
                names |= {f"train-{who}-{tokens}" for tokens in budgets - {suite.training_of(model).tokens}}
    return names
