"""How good are samples? Metrics on arrays and features, and a judge to make the features."""

from tfdiffusion.evaluation.frechet import frechet_distance, frechet_distance_from_moments
from tfdiffusion.evaluation.judge import Verdict, build_judge, features, judge_samples, train_judge
from tfdiffusion.evaluation.neighbours import nearest_neighbours

__all__ = [
    "Verdict",
    "build_judge",
    "features",
    "frechet_distance",
    "frechet_distance_from_moments",
    "judge_samples",
    "nearest_neighbours",
    "train_judge",
]
