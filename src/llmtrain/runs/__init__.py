"""Run folders and what they hold, apart from checkpoints: a layer that training, evaluation and publishing share.

    folders.py      make, find, lock and link run folders
    metadata.py     meta.json: the run's id, code, machine and environment
    attempts.py     restarts without progress, so that a crash loop ends
    events.py       events.jsonl: starts, stops, saves
    heartbeat.py    a file that is touched while the run gets something done, for `health`
    summary.py      summary.json
    generated_samples.py    samples.jsonl: what the model in training wrote
    curves.py       metrics.jsonl as curves, with fewer points by downsample.py
    listing.py      what is known of each run of a folder
    removal.py      remove runs for good
    stores.py       runs in a store: the folder here that is the copy of one, and fetching it
    upload.py       copies a run to its store while it trains
    upload_owner.py upload.json: which process uploads a run
    json_files.py   JSON that every reader takes, and files that may be damaged

`training.resume` finds the step from which a run is resumed, since that needs checkpoints.
"""
