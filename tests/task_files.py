"""Tasks for the evaluation harness, two in the format of PIQA and BoolQ, with their data."""

import json

PIQA = """\
task: piqa
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
BOOLQ = """\
task: boolq
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{passage}}}}\\nQuestion: {{{{question}}}}?\\nAnswer:"
doc_to_target: label
doc_to_choice: ["no", "yes"]
metric_list:
  - metric: acc
metadata:
  version: 2.0
"""
WRITE = """\
task: write
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs:
  until: [{until}]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
metadata:
  version: 1.0
"""
GOALS = [
    {"goal": f"To open jar {i}", "sol1": "twist the lid", "sol2": "paint it blue all over",
     "label": i % 2}
    for i in range(6)
]  # fmt: skip
QUESTIONS = [
    {"passage": f"Box {i} is red.", "question": f"is box {i} red", "label": 1} for i in range(4)
]


def save_tasks(folder, *, boolq=True):
    """Write the definitions and their data; without `boolq` its data is missing."""
    folder.mkdir(parents=True)
    for name, definition, rows in (("piqa", PIQA, GOALS), ("boolq", BOOLQ, QUESTIONS)):
        data = folder / f"{name}.jsonl"
        if boolq or name != "boolq":
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(definition.format(data=data))
    return folder


def save_writing_task(folder, answers, until):
    """Write a task that lets the model generate up to a text; `answers` are the right ones."""
    rows = [{"text": text, "target": target} for text, target in answers.items()]
    (folder / "write.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = WRITE.format(data=folder / "write.jsonl", until=json.dumps(until))
    (folder / "write.yaml").write_text(definition)
