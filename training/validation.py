"""Validation during training: greedy answers to questions that are not trained on."""

import math
import time
from collections.abc import Callable

from data.completions import Completion, SamplingParams
from data.datasets import Example
from data.prompts import Question, load_text_questions
from data.tokenizer import Tokenizer
from hub.config import Config
from hub.device import memory_phase
from hub.errors import InputError, read_json
from hub.weights import copy_side_files
from training.journal import checksum, write_json
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
            if options.eval_data and not options.resume:
                raise InputError("--eval-data needs --eval-every")
            return
        if not options.eval_data:
            raise InputError("--eval-every needs --eval-data")
        self.questions = self.load_questions()
        self.checksum = checksum(options.eval_data)

    def load_questions(self) -> list[Question]:
        """Returns the questions. Those whose prompt fills the context are dropped and counted."""
        options = self.options
        return load_text_questions(
            options.eval_data,
            self.tokenizer,
            style=options.prompt_style,
            limit=Config.from_pretrained(options.model).max_position_embeddings - 1,
            skip_bad=options.skip_bad_lines,
        )

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
        if reward > self.best_so_far(run):
            self.keep(run, step, reward)
        return {"eval_reward": reward, "eval_seconds": time.perf_counter() - started}

    def best_so_far(self, run: Run) -> float:
        """Returns the reward of RUN/best/; minus infinity if there is none, or on other data."""
        path = run.folder / "best" / "best.json"
        best = read_json(path) if path.exists() else {}
        if best.get("eval_data_crc32") != self.checksum:
            return -math.inf
        return best["eval_reward"]

    def measure(self, model) -> float:
        """Returns the mean reward of one greedy answer to each question."""
        params = SamplingParams(max_new_tokens=self.options.eval_new_tokens, temperature=0.0)

        def judge(i: int, completion: Completion) -> float:
            return self.judge(self.questions[i].example, completion.text)

        with memory_phase("the validation", "a lower --eval-new-tokens", "fewer questions"):
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
            about = {"step": step, "eval_reward": reward, "eval_data_crc32": self.checksum}
            write_json(best / "best.json", about)
        barrier()
