"""One question of each task in all its forms: LLM-Adapters' row, the hub's row, and a Question."""

from typing import Any

from datamodules import Question

# the instruction strings of LLM-Adapters' files, with made-up content
INSTRUCTIONS = {
    "boolq": (
        "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false"
    ),
    "piqa": (
        "Please choose the correct solution to the question: open a jar\n\nSolution1: twist it\nfirmly\n\n"
        "Solution2: eat it\n\nAnswer format: solution1/solution2"
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Ann left. How does Bo feel?\n\n"
        "Answer1: sad Answer2: tall Answer3: blue\n\nAnswer format: answer1/answer2/answer3"
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Surfing: [header] A man. He\n\n"
        "Ending1: swims. Ending2: flies. Ending3: sits. Ending4: reads.\n\n"
        "Answer format: ending1/ending2/ending3/ending4"
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ann beat Bo, so _ won.\n\nOption1: Ann Option2: Bo Answer format: option1/option2"
    ),
    "ARC-Challenge": (
        "Please choose the correct answer to the question: What is hot?\n\n"
        "Answer1: ice Answer2: fire Answer3: snow Answer4: rain Answer5: fog\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5"
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: What is hot?\n\n"
        "Answer1: ice Answer2: fire Answer3: snow\n\nAnswer format: answer1/answer2/answer3"
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: The sun is\n\n"
        "Answer1: cold Answer2: a star Answer3: blue Answer4: small\n\nAnswer format: answer1/answer2/answer3/answer4"
    ),
}
SECOND = {
    "boolq": "false",
    "piqa": "solution2",
    "social_i_qa": "answer2",
    "hellaswag": "ending2",
    "winogrande": "option2",
    "ARC-Challenge": "answer2",
    "ARC-Easy": "answer2",
    "openbookqa": "answer2",
}
QUESTIONS = {
    "boolq": Question("boolq", "is ice cold?", ("true", "false"), 1),
    "piqa": Question("piqa", "open a jar", ("twist it\nfirmly", "eat it"), 1),
    "social_i_qa": Question("social_i_qa", "Ann left. How does Bo feel?", ("sad", "tall", "blue"), 1),
    "hellaswag": Question("hellaswag", "Surfing: [header] A man. He", ("swims.", "flies.", "sits.", "reads."), 1),
    "winogrande": Question("winogrande", "Ann beat Bo, so _ won.", ("Ann", "Bo"), 1),
    "ARC-Challenge": Question("ARC-Challenge", "What is hot?", ("ice", "fire", "snow", "rain", "fog"), 1),
    "ARC-Easy": Question("ARC-Easy", "What is hot?", ("ice", "fire", "snow"), 1),
    "openbookqa": Question("openbookqa", "The sun is", ("cold", "a star", "blue", "small"), 1),
}
ARC_CHOICES = {"text": ["ice", "fire", "snow", "rain", "fog"], "label": ["A", "B", "C", "D", "E"]}
HUB_ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is ice cold", "passage": "Ice.", "answer": False},
    "piqa": {"goal": "open a jar", "sol1": "twist it\nfirmly", "sol2": "eat it", "label": 1},
    "social_i_qa": {
        "context": "Ann left.",
        "question": "How does Bo feel?",
        "answerA": "sad",
        "answerB": "tall",
        "answerC": "blue",
        "label": "2",
    },
    "hellaswag": {
        "activity_label": "Surfing",
        "ctx": "[header] A man. He",
        "endings": ["swims.", "flies.", "sits.", "reads."],
        "label": "1",
    },
    "winogrande": {"sentence": "Ann beat Bo, so _ won.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    "ARC-Challenge": {"id": "1", "question": "What is hot?", "choices": ARC_CHOICES, "answerKey": "B"},
    "ARC-Easy": {
        "id": "2",
        "question": "What is hot?",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "openbookqa": {
        "id": "3",
        "question_stem": "The sun is",
        "choices": {"text": ["cold", "a star", "blue", "small"], "label": ["A", "B", "C", "D"]},
        "answerKey": " B",
    },
}


def row_of(task: str) -> dict[str, str]:
    answer = SECOND[task]
    output = f"the correct answer is {answer}"
    return {"instruction": INSTRUCTIONS[task], "input": "", "output": output, "answer": answer}
