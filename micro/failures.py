"""How a chain of thought goes wrong: is it the reading, a step, their order, or where to stop?"""

from micro.world import SIGNS, STATES, Question, Walk

# What a wrong answer is put down to: the first thing that went wrong.
FAILURES = (
    "no thoughts",
    "misread",
    "wrong step",
    "out of order",
    "stopped early",
    "went on",
    "wrong answer",
)


def parse_form(form: str, domain: str) -> Question | Walk:
    """Returns the question of a canonical form, such as 3+4-2 of domain A.

    >>> parse_form("3+4-2", "A").chain(1)
    '<think>3#1+4#2-2;3;#1+4=7;</think><answer>7</answer>'
    """
    states = STATES[domain]
    if domain == "G":
        target = dict(zip(form[2::2], form[3::2]))
        ring = [form[0]]
        while len(ring) < len(states):
            ring.append(target[ring[-1]])
        return Walk(tuple(states.index(node) for node in ring), int(form[1]))
    pairs = zip(form[1::2], form[2::2])
    operations = tuple((SIGNS[domain].index(sign), int(n)) for sign, n in pairs)
    return Question(domain, states.index(form[0]), operations)


def failure(response: str, question: Question | Walk) -> str:
    """Returns which of FAILURES a wrong response to a question is.

    misread: the restatement is not the question. out of order: the first step that is wrong is a
    right one of another number than the one that is due (of A and L; a graph's hops have no
    numbers). stopped early, went on: all steps are right, but they are too few, or more follow (a
    thought that never ends goes on, too). wrong answer: all is right but that.
    """
    thought, end, _ = response.partition("</think>")
    right = question.chain().partition("</think>")[0]
    if not thought.startswith("<think>"):
        return "no thoughts"
    if not thought.startswith(f"<think>{question.restated};"):
        return "misread"
    if thought == right:
        return "wrong answer"
    if thought.startswith(right):
        return "went on"
    if right.startswith(thought) and end:
        return "stopped early"
    return "out of order" if is_out_of_order(thought, question) else "wrong step"


def is_out_of_order(thought: str, question: Question | Walk) -> bool:
    """Is the first step that is not the one that is due a right one of another number?"""
    if isinstance(question, Walk):
        return False
    steps = thought.split(";")[2:]  # behind the restatement and the start
    for done, step in enumerate(steps[: question.depth]):
        state = question.after(done)
        right = [question.step(i, state) for i in range(1, question.depth + 1)]
        if f"{step};" != right[done]:
            return f"{step};" in right
    return False
