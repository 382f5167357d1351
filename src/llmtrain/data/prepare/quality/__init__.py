"""Quality steps: which documents of a corpus stay, and what of their text, by the ordered list `prepare.steps`.

    texts ─ plan.Plan.examine ─▶ Examined ─ duplicates ─▶ the step and rule that leaves each document out
            one document at a time, in workers   all documents at once, in the main process

| file | subject |
|---|---|
| `plan` | the list, built: runs the steps that look at one document |
| `length`, `language`, `gopher`, `c4`, `pii`, `own` | one such step each |
| `near_duplicates` | MinHash signatures of texts, and their search by bands |
| `duplicates` | the steps that compare documents, in the order of the list |
| `workers` | processes for the steps that hold the GIL |
| `records` | what each step did, as the manifest keeps it |

A step is a function of the text alone, so all steps that look at one document run in one reading of the corpus, and
what the comparing steps between them leave out is settled afterwards, with the same result as step after step.
"""
