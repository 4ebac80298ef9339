//! The Containerfile, which no engine builds here: what it copies is there, and what the manifests start is in it.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::support::{documents, kustomize, manifests};

fn containerfile() -> Vec<Vec<String>> {
    let text = fs::read_to_string(manifests().join("../Containerfile")).unwrap().replace("\\\n", " ");
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_whitespace().map(String::from).collect()).collect()
}

/// Names of the workspace's programs.
fn programs() -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--locked", "--offline"])
        .current_dir(manifests().join(".."))
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let targets = packages.flat_map(|package| package["targets"].as_array().unwrap());
    let programs = targets.filter(|target| target["kind"] == serde_json::json!(["bin"]));
    programs.map(|target| target["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_the_image_is_made_from_is_there() {
    let root = manifests().join("..");
    let programs = programs();
    let mut copied = BTreeSet::new();
    for line in containerfile().iter().filter(|line| line[0] == "COPY") {
        let (from, to) = (&line[1..line.len() - 1], line.last().unwrap());
        match from.split_first().unwrap() {
            (stage, [path]) if stage == "--from=build" => {
                let name = path.rsplit('/').next().unwrap();
                assert!(path.starts_with("/src/target/") && programs.contains(name), "{path}");
                assert_eq!(*to, format!("/usr/local/bin/{name}"));
            }
            _ => {
                for path in from {
                    assert!(root.join(path).exists(), "{path}");
                    copied.insert(path.clone());
                }
            }
        }
    }
    // Every member of the workspace, or cargo would not begin; and what meshctl has in it.
    let workspace = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let members = workspace.split("members = [").nth(1).unwrap().split(']').next().unwrap();
    for member in members.lines().filter_map(|line| line.trim().strip_prefix('"')) {
        let top = member.split(['/', '"']).next().unwrap();
        let top = if top.starts_with("ebpf-polic") { "ebpf-policy" } else { top };
        assert!(copied.contains(top), "{member}");
    }
    assert!(copied.contains("manifests"));
}

#[test]
fn every_program_that_the_manifests_start_is_in_the_image() {
    let in_image: BTreeSet<String> = containerfile()
        .into_iter()
        .filter(|line| line[0] == "COPY")
        .map(|mut line| line.pop().unwrap())
        .collect();
    for below in ["overlays/kubeadm", "cleanup"] {
        for set in documents(&kustomize(below)).iter().filter(|object| object["kind"] == "DaemonSet") {
            let spec = &set["spec"]["template"]["spec"];
            let lists = ["containers", "initContainers"].map(|list| spec[list].as_array().cloned());
            for container in lists.into_iter().flatten().flatten() {
                let program = container["command"][0].as_str().unwrap();
                // Of coreutils, which Debian's image always has.
                assert!(in_image.contains(program) || program == "/bin/sleep", "{below}: {program}");
            }
        }
    }
    let command = containerfile().into_iter().find(|line| line[0] == "CMD").unwrap().join(" ");
    assert!(in_image.iter().any(|program| command.contains(&format!("\"{program}\""))), "{command}");
}
