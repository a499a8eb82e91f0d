"""The files of `deploy/`, as far as they can be checked without a cluster."""

import re
import shlex

import pytest
import yaml

from launch.forms import declared
from launch.options import BatchOptions, Options
from launch.serve.options import ServeOptions
from tests.launch.process import ROOT

DEPLOY = ROOT / "deploy"
COMMANDS = {"batch": BatchOptions, "serve": ServeOptions}


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_runs_a_command_that_there_is_with_options_that_it_has(name):
    job = documents(name)[0]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    flowcache, command, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (flowcache, command) == ("flowcache", name)
    shared = [one for one in declared(Options) if one.batch]
    known = {one.flag for one in [*declared(COMMANDS[name]), *shared]}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_every_group_has_the_image_the_data_and_gpus_for_its_gangs(name):
    spec = documents(name)[0]["spec"]["rayClusterSpec"]
    [workers] = spec["workerGroupSpecs"]
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["image"] == "flowcache:latest" and set(container["resources"]["limits"]) >= {"cpu", "memory"}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert group["rayStartParams"] is not None
    [worker] = workers["template"]["spec"]["containers"]
    gangs, stages = re.search(r"--gangs (\d+) --pp (\d+)", documents(name)[0]["spec"]["entrypoint"]).groups()
    gpus = workers["replicas"] * int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == int(gangs) * int(stages)


def test_the_service_finds_the_head_and_the_key_is_no_text_of_the_file():
    job, service = documents("serve")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()
    [container] = head["spec"]["containers"]
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    [key] = container["env"]
    assert key["name"] == "FLOWCACHE_API_KEY" and "secretKeyRef" in key["valueFrom"]


def test_the_image_copies_what_is_there():
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)", text, re.M):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    extras = set(re.search(r"\.\[([\w,]+)\]", text)[1].split(","))
    assert {f"{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras} == {True}
