"""Validation during training: greedy answers to questions that are not trained on."""

import time
from collections.abc import Callable

from data.completions import Completion, SamplingParams
from data.datasets import Example, load_examples
from data.images import ImageConfig
from data.prompts import Question, format_prompt, make_prompt
from data.tokenizer import Tokenizer
from hub.config import Config
from hub.errors import InputError
from hub.weights import copy_side_files
from training.journal import write_json
from training.optimizer import forward_dtype
from training.options import TrainOptions
from training.parallel import barrier, is_first
from training.rollout import rollout
from training.run import Run

MAX_BATCH = 256  # answers at a time: it changes memory only


class Validation:
    """Asks the questions of --eval-data after every --eval-every steps, and keeps the best model.

    judge(example, response): the reward of an answer, of which validation takes the mean.
    """

    def __init__(
        self, options: TrainOptions, tokenizer: Tokenizer, judge: Callable[[Example, str], float]
    ):
        """Raises InputError where --eval-every is given without --eval-data, or where one of its
        questions has an image: while training, the vision tower rests."""
        self.options, self.tokenizer, self.judge = options, tokenizer, judge
        self.questions: list[Question] = []
        if options.eval_every == 0:
            return
        if not options.eval_data:
            raise InputError("--eval-every needs --eval-data")
        self.questions = self.load_questions()

    def load_questions(self) -> list[Question]:
        """Returns the questions. Those whose prompt fills the context are dropped and counted."""
        limit = Config.from_pretrained(self.options.model).max_position_embeddings - 1

        def convert(example: Example) -> Question | None:
            if example.images:
                raise InputError(f"question {example.id} has an image: validation is on text only")
            text = format_prompt(example, self.options.prompt_style)
            prompt = make_prompt(text, [], self.tokenizer, ImageConfig())
            return Question(example, prompt) if len(prompt.ids) <= limit else None

        too_long = f"the prompt is over {limit} tokens"
        return load_examples(self.options.eval_data, convert, too_long=too_long).items

    def after_step(self, run: Run) -> dict[str, float]:
        """Returns what metrics.jsonl is to say about the step that was just taken: nothing, or
        every --eval-every steps eval_reward and eval_seconds.

        Where the reward is the highest of the run so far, the model goes to RUN/best/.
        """
        step = run.step + 1  # the step is counted once its metrics are complete
        if not self.questions or step % self.options.eval_every != 0:
            return {}
        started = time.perf_counter()
        reward = self.measure(run.model)
        earlier = [record["eval_reward"] for record in run.records if "eval_reward" in record]
        if not earlier or reward > max(earlier):
            self.keep(run, step, reward)
        return {"eval_reward": reward, "eval_seconds": time.perf_counter() - started}

    def measure(self, model) -> float:
        """Returns the mean reward of one greedy answer to each question."""
        params = SamplingParams(max_new_tokens=self.options.eval_new_tokens, temperature=0.0)

        def judge(i: int, completion: Completion) -> float:
            return self.judge(self.questions[i].example, completion.text)

        _, rewards = rollout(
            model,
            self.tokenizer,
            [question.prompt for question in self.questions],
            params,
            max_batch=MAX_BATCH,
            dtype=forward_dtype(self.options),
            judge=judge,
        )
        return rewards.mean().item()

    def keep(self, run: Run, step: int, reward: float) -> None:
        """Writes RUN/best/, a model folder, and in its best.json which step it is of."""
        best = run.folder / "best"
        if is_first():
            best.mkdir(exist_ok=True)
            copy_side_files(run.folder / "model", best)
        run.write_model(best)
        if is_first():
            write_json(best / "best.json", {"step": step, "eval_reward": reward})
        barrier()
