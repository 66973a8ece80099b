"""The recipe for Kubernetes, checked against the schemas of Kubernetes and of the training operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import detr_fast
from detr_fast.engine.config import Config

MANIFEST = Path(detr_fast.__file__).parent / "clusters" / "kubeflow.yaml"


def manifests() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with kubernetes-validate")
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def whole(**properties: Any) -> dict[str, Any]:
    """An object with these properties and no others; those whose name ends in ``_`` are required."""
    plain = {name.rstrip("_"): value for name, value in properties.items()}
    required = [name.rstrip("_") for name in properties if name.endswith("_")]
    return {"type": "object", "properties": plain, "required": required, "additionalProperties": False}


COUNT, TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}
REPLICAS = whole(replicas=COUNT, restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]}, template_={})
# Source: the types of kubeflow.org/v1, training-operator, pkg/apis/kubeflow.org/v1/{common,pytorch}_types.go.
PYTORCH_JOB = whole(
    apiVersion_={"const": "kubeflow.org/v1"},
    kind_={"const": "PyTorchJob"},
    metadata_=whole(name_={"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}, namespace=TEXT),
    spec_=whole(
        nprocPerNode={"type": "string", "pattern": r"^(auto|cpu|gpu|\d+)$"},
        runPolicy=whole(
            cleanPodPolicy={"enum": ["All", "Running", "None"]},
            ttlSecondsAfterFinished=COUNT,
            activeDeadlineSeconds=COUNT,
            backoffLimit=COUNT,
            schedulingPolicy={"type": "object"},
        ),
        elasticPolicy=whole(
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rdzvBackend={"enum": ["c10d", "etcd", "etcd-v2"]},
            rdzvPort=COUNT,
            rdzvHost=TEXT,
            rdzvId=TEXT,
            rdzvConf={"type": "array", "items": whole(key_=TEXT, value_=TEXT)},
            standalone={"type": "boolean"},
            maxRestarts=COUNT,
            metrics={"type": "array"},
        ),
        pytorchReplicaSpecs_=whole(Master=REPLICAS, Worker_=REPLICAS),
    ),
)


def test_the_manifest_is_valid() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="the package kubernetes-validate brings the schemas")
    job, claim = manifests()
    pytest.importorskip("jsonschema").validate(job, PYTORCH_JOB)
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "worker"}, "template": template}
    for version in ("1.29", "1.34"):
        validator.validate(pod, version, strict=True)
        validator.validate(claim, version, strict=True)


def test_a_fault_in_the_manifest_is_found() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="the package kubernetes-validate brings the schemas")
    schemas = pytest.importorskip("jsonschema")
    job, _ = manifests()
    worker: Any = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "worker"}, "template": worker["template"]}
    worker["template"]["spec"]["containers"][0]["comand"] = ["sh"]
    with pytest.raises(validator.ValidationError, match="comand"):
        validator.validate(pod, "1.34", strict=True)
    job["spec"]["elasticPolicy"]["maxRestart"] = 1
    with pytest.raises(schemas.ValidationError, match="maxRestart"):
        schemas.validate(job, PYTORCH_JOB)


def test_pods_survive_an_eviction_and_share_one_run() -> None:
    job, claim = manifests()
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    # The operator knows the container by this name, and torchrun ends with 1 after a signal.
    assert (container["name"], container["command"], worker["restartPolicy"]) == ("pytorch", ["torchrun"], "OnFailure")
    elastic = job["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert 30 < int(environment["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim_of(pod, "/runs", container) == {"claimName": claim["metadata"]["name"]}
    assert claim_of(pod, "/data", container)["readOnly"]


def test_the_readme_says_how_often_an_error_is_repeated() -> None:
    specification = manifests()[0]["spec"]
    restarts = specification["elasticPolicy"]["maxRestarts"] + 1
    attempts = restarts * (specification["runPolicy"]["backoffLimit"] + 1)
    assert f"times, {attempts}, then the job has failed" in MANIFEST.with_name("README.md").read_text()


def claim_of(pod: Mapping[str, Any], path: str, container: Mapping[str, Any]) -> dict[str, Any]:
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == path]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == name]
    return dict(volume["persistentVolumeClaim"])


def test_the_command_of_the_pods_is_understood(accepted: Callable[..., tuple[Any, Config]]) -> None:
    (container,) = manifests()[0]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["-m", "detr_fast"]
    parsed, config = accepted(container["args"][2:])
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert (parsed.path, parsed.resume) == ("/data", "auto")
    assert any(config.train.output.startswith(f"{path}/") for path in paths)
