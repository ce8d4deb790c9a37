"""What is tried before a run has a folder: that its task has every problem it will ask, and that they fit the model."""

from rung.core.errors import TaskError
from rung.core.progress import Listener, silent
from rung.lm.decoder import Decoder
from rung.lm.weights.families import from_hugging_face
from rung.lm.weights.files import COMPANIONS, read_files, read_json
from rung.lm.weights.hf import Folder
from rung.lm.weights.sources import locate
from rung.model.model import Model
from rung.tasks.base import Split, Task, problems
from rung.tasks.load import RewardTask
from rung.text.pretrained import Tokenizer
from rung.train.config import GroupRL
from rung.train.rollouts import prompt_of

LOOKED_AT = 64  # problems of a part, where the task makes them; a list is read to its end


def check_problems(recipe: GroupRL, task: Task, listener: Listener = silent) -> None:
    """Raises TaskError for an empty part that the run will ask, and for a problem that is too long for the model."""
    model = weightless(recipe, listener)
    parts: list[Split] = ["train", "held_out"]
    if 0 < recipe.eval_every < recipe.num_steps:
        parts.append("validation")
    for split in parts:
        try:
            found = problems(task, split, len(task) if isinstance(task, RewardTask) else LOOKED_AT)
        except TaskError as error:
            if split != "validation":
                raise
            raise TaskError(
                f"{error}. eval_every = {recipe.eval_every} asks validation problems: set it to 0 to do without"
            ) from error
        for problem in found:
            prompt_of(model, problem, recipe.max_tokens)


def weightless(recipe: GroupRL, listener: Listener) -> Model:
    """The recipe's model as far as its shape and its tokenizer go; no tensor of it is read."""
    path = locate(recipe.model, listener)
    raw = read_json(path / "config.json")
    config = from_hugging_face(raw, where=str(path / "config.json"))
    text = Tokenizer.from_files(read_files(path, COMPANIONS), raw, where=str(path))
    folder = Folder(config=raw, shards=())
    return Model(decoder=Decoder(config, device="meta"), folder=folder, name=recipe.model, text=text)
