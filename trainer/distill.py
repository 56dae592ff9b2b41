"""The distill stage: a small language model that imitates a large one, on the same data, loop and checkpoints.
The loss is in `objectives.distill`, the student's making in `models`."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.__main__ import stage_main
from trainer.config import Distill, Recipe
from trainer.errors import UserError
from trainer.models import from_config, load_model, make_config, require_length, require_same_vocabulary
from trainer.objectives.distill import Distillation
from trainer.session import Session
from trainer.students import student_from_layers


def run(recipe: Recipe) -> None:
    """Train the student of `recipe.distill` and write `<run_dir>/distill/model`."""
    if recipe.distill is None:
        raise UserError("the recipe has no `distill` section", "one that says which student")
    stage = recipe.distill
    objective = stage.objective or (recipe.pretrain.objective if recipe.pretrain else None)
    data = stage.data or (recipe.pretrain.data if recipe.pretrain else None)
    if objective is None or data is None:
        raise UserError("distill.objective and distill.data are not given", "both, where there is no pretrain section")
    if data.packing == "concatenate" and objective.name != "causal_lm":
        raise UserError(
            "distill.data.packing: concatenate with masked_lm", "isolate, for rows of a masked LM", "set it"
        )
    folder = stage.teacher or recipe.model_dir("pretrain")
    session = Session(recipe, "distill", stage, objective, data)
    blank = session.engine.is_given_weights
    teacher = load_model(folder, session.causal, blank)
    require_same_vocabulary(folder, teacher, session.tokenizer)
    require_length(teacher.config, data.sequence_length, f"the teacher {folder}")
    student = make_student(stage, teacher, session.tokenizer, session.causal, data.sequence_length, recipe.seed, blank)
    if stage.weights.hidden and student.config.hidden_size != teacher.config.hidden_size:
        raise UserError(
            f"hidden sizes differ: student {student.config.hidden_size}, teacher {teacher.config.hidden_size}",
            "equal ones for the cosine of hidden states",
            "set distill.weights.hidden=0, or give the student the teacher's hidden_size",
        )
    objective = Distillation(session.frozen(teacher), stage.temperature, stage.weights)
    session.train(student, objective, {"teacher": folder})


def make_student(
    stage: Distill,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    causal: bool,
    sequence_length: int,
    seed: int,
    blank: bool = False,
) -> PreTrainedModel:
    """The student as the recipe wants it: layers of the teacher, or a shape of its own with weights from `seed` (or
    with none: see `models.build`)."""
    if stage.student.config:
        architecture = stage.student.architecture or teacher.config.model_type
        config = make_config(architecture, stage.student.config, tokenizer, sequence_length)
        return from_config(config, causal, seed, blank)
    layers = stage.student.keep_layers or tuple(range(0, teacher.config.num_hidden_layers, stage.student.every or 1))
    return student_from_layers(teacher, layers, stage.student.architecture, blank)


if __name__ == "__main__":
    stage_main("distill")
