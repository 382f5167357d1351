"""Finds what the Pod Security Standard `restricted` forbids in a pod.

When a Job is created in a namespace that enforces the standard, the API server only warns, and then blocks its pods.
Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

VOLUME_TYPES: Final = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
}
SECCOMP: Final = ("RuntimeDefault", "Localhost")
SYSCTLS: Final = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"),
    *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
    *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
    *("net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
}
SELINUX_TYPES: Final = (None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
ALLOWED_CAPABILITY: Final = "NET_BIND_SERVICE"


def violations(pod: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each thing that is forbidden in the spec of a pod, with its fix."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield key, "remove it"
    for volume in pod.get("volumes", []):
        for kind in sorted(set(volume) - {"name"} - VOLUME_TYPES):
            yield f"the volume {volume['name']} of type {kind}", "use a claim, or kubernetes.pod_security: privileged"
    pod_context = pod.get("securityContext") or {}
    for sysctl in pod_context.get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"the sysctl {sysctl['name']}", "remove it"
    yield from _in_security_context(pod_context, "the pod")
    for container in [*pod.get("initContainers", []), *pod.get("containers", []), *pod.get("ephemeralContainers", [])]:
        yield from _in_container(container, pod_context)


def _in_container(container: dict[str, Any], pod_context: dict[str, Any]) -> Iterator[tuple[str, str]]:
    context, name = container.get("securityContext") or {}, f"container {container['name']}"
    merged = {**pod_context, **context}
    yield from _in_security_context(context, name)
    if merged.get("runAsNonRoot") is not True:
        yield f"{name} to run as root", "set runAsNonRoot: true"
    if (merged.get("seccompProfile") or {}).get("type") not in SECCOMP:
        yield f"{name} without a seccomp profile", "set seccompProfile: {type: RuntimeDefault}"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{name} to gain privileges", "set allowPrivilegeEscalation: false"
    if context.get("privileged"):
        yield f"{name} to be privileged", "remove privileged"
    if context.get("procMount", "Default") != "Default":
        yield f"{name} with another procMount", "remove procMount"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in capabilities.get("drop", []):
        yield f"{name} to keep capabilities", "set capabilities: {drop: [ALL]}"
    for added in capabilities.get("add", []):
        if added != ALLOWED_CAPABILITY:
            fix = "remove it; for RDMA use a namespace of its own, kubernetes.pod_security: privileged"
            yield f"{name} to add the capability {added}", fix
    for port in container.get("ports", []):
        if port.get("hostPort"):
            yield f"{name} to take the host's port {port['hostPort']}", "remove hostPort"
    probes = [container.get(f"{probe}Probe") or {} for probe in ("startup", "liveness", "readiness")]
    hooks = [*probes, *(container.get("lifecycle") or {}).values()]
    if any((hook.get(way) or {}).get("host") for hook in hooks for way in ("httpGet", "tcpSocket")):
        yield f"{name} to probe another host", "remove host from its probes"


def _in_security_context(context: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """Yield each thing that is forbidden in the security context of a pod or a container, with its fix."""
    if context.get("runAsUser") == 0:
        yield f"{name} to run as user 0", "set runAsUser: 1000"
    if (context.get("seccompProfile") or {}).get("type") == "Unconfined":
        yield f"{name} without seccomp", "set seccompProfile: {type: RuntimeDefault}"
    if (context.get("appArmorProfile") or {}).get("type") == "Unconfined":
        yield f"{name} without AppArmor", "remove appArmorProfile"
    options = context.get("seLinuxOptions") or {}
    if options.get("type") not in SELINUX_TYPES or options.get("user") or options.get("role"):
        yield f"{name} with other seLinuxOptions", "remove seLinuxOptions"
