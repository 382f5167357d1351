"""Runs on a Kubernetes cluster.

    config ─▶ launch.py ─▶ render.py (pod · workloads · surroundings) ─▶ documents ─▶ check.py ─▶ kubectl apply
    kubectl get ─▶ watch.py ─▶ pods, ranks, causes of failure, the run's exit code

    launch.py         a run, its name, and the settings of its pods
    pod.py            the template of a pod: command, environment, volumes, probes, security
    workloads.py      Job, JobSet and StatefulSet around it
    surroundings.py   Service, ConfigMap, claims of volumes, NetworkPolicy, PodDisruptionBudget
    render.py         all documents of a run, as plain dicts and as YAML
    check.py          faults that a schema accepts but a cluster rejects, with their fixes; with pod_security.py
    kubectl.py        calls kubectl
    watch.py          the state of a run and its pods, and what is wrong with them
    follow.py         waits for the end of a run
    removal.py        ends pods and removes objects

Nothing here imports torch. kubectl knows the cluster's address and credentials.
"""
