"""The workload around a run's pods: an Indexed Job, a JobSet or a StatefulSet.

A Job's failure policy follows the exit codes of `errors.py`. 42 and 2 would come again, so they end the Job. 75 and
disruptions are tried again and do not count as retries; 76 and 1 count.
"""

from __future__ import annotations

from llmtrain.errors import ConfigError, Preempted, WillFailAgain
from llmtrain.launching.kubernetes.launch import REPLICA, ClusterRun, Document
from llmtrain.launching.kubernetes.pod import CONTAINER, pod_template


def workload(run: ClusterRun) -> Document:
    """Return the workload of the run's kind."""
    make = {"job": _job, "jobset": _job_set, "statefulset": _stateful_set}
    return make[run.settings.kind](run)


def _metadata(run: ClusterRun) -> Document:
    queue = {"kueue.x-k8s.io/queue-name": run.settings.queue} if run.settings.queue else {}
    return {"name": run.name, "labels": {**run.labels, **queue}}


def _job(run: ClusterRun) -> Document:
    # One failure of the run can end every pod with a code that counts, so the limit is for all pods together.
    spec = _job_spec(run, backoff_limit=run.settings.retries * run.settings.nodes)
    spec["ttlSecondsAfterFinished"] = run.settings.keep_hours * 3600
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(run), "spec": spec}


def _job_spec(run: ClusterRun, *, backoff_limit: int) -> Document:
    def on_exit(action: str, *codes: int) -> Document:
        return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(codes)}}

    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    hopeless = on_exit("FailJob", ConfigError.exit_code, WillFailAgain.exit_code)
    return {
        "completionMode": "Indexed",
        "completions": run.settings.nodes,
        "parallelism": run.settings.nodes,
        "backoffLimit": backoff_limit,
        "podReplacementPolicy": "Failed",
        "activeDeadlineSeconds": run.settings.deadline_hours * 3600,
        "podFailurePolicy": {"rules": [hopeless, disrupted, on_exit("Ignore", Preempted.exit_code)]},
        "template": pod_template(run),
    }


def _job_set(run: ClusterRun) -> Document:
    """Return a JobSet, which restarts all pods when one has failed, and creates its Service itself."""
    job = {"metadata": {"labels": dict(run.labels)}, "spec": _job_spec(run, backoff_limit=0)}
    hopeless = {"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(run),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": run.name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": run.settings.retries, "rules": [hopeless]},
            "ttlSecondsAfterFinished": run.settings.keep_hours * 3600,
            "replicatedJobs": [{"name": REPLICA, "replicas": 1, "template": job}],
        },
    }


def _stateful_set(run: ClusterRun) -> Document:
    """Return a StatefulSet, whose pods keep their numbers and resume the run whenever they are restarted."""
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _metadata(run),
        "spec": {
            "serviceName": run.name,
            "replicas": run.settings.nodes,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": run.selector},
            "template": pod_template(run),
        },
    }
