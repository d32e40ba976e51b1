"""Published methods that cannot be run here, and what each of them would take."""

from saap_jax.recipes.base import Recipe


def _missing(title: str, paper: str, calibration: str, missing: str) -> Recipe:
    return Recipe(title=title, paper=f"arXiv:{paper}", calibration=calibration, missing=missing)


RECIPES = {
    "bonsai": _missing(
        "Bonsai: regression of the loss on random masks, drawn by a prior from activations, in rounds",
        "2402.05406",
        "WikiText-2 or C4",
        "masks are drawn evenly here, not by a prior; the estimator 'perturbation' is the regression alone",
    ),
    "ddp": _missing(
        "DDP: soft gates that are sharpened under a penalty for the budget, then a scale for each unit",
        "2603.08065",
        "FineWeb-Edu, 30 million tokens",
        "its formulas were read in a review, not in the paper; 'learn(rule=soft)' is made of that review",
    ),
    "disp-llm": _missing(
        "DISP-LLM: gates trained by a network, each sub-block on channels of the stream of its own",
        "2410.11988",
        "WikiText-2 or Alpaca",
        "sub-blocks that read other channels of the stream than they write need index operations that models here lack",
    ),
    "llm-surgeon": _missing(
        "LLM Surgeon: Kronecker-factored curvature of the loss, several shots, correlated updates",
        "2312.17244",
        "WikiText-2 (training part)",
        "second moments of the gradients of sub-blocks' outputs are not observed yet",
    ),
    "modegpt": _missing(
        "MoDeGPT: ridge leverage in the MLP, decompositions in attention, shares by softmax of block influence",
        "2408.09632",
        "WikiText-2 (training part)",
        "decompositions of attention matrices are no selection of units; what it does to the MLP is 'modegpt-mlp'",
    ),
    "slicegpt": _missing(
        "SliceGPT: rotations of the residual stream, cut by principal components",
        "2401.15024",
        "WikiText-2 or Alpaca",
        "it rotates the stream and adds matrices to skip connections, which is no selection of units",
    ),
    "tyr": _missing(
        "Týr-the-Pruner: shares of layers by evolution over local prunings of every sparsity",
        "2503.09657",
        "FineWeb-Edu",
        "its evolution judges layers whose weights were corrected for each sparsity; evolve judges masks",
    ),
}
