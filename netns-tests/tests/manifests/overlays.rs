//! Every overlay, rendered by kubectl and applied.

use std::fs;

use netns_tests::wait;
use serde_json::{Value, json};

use crate::support::{NAMESPACE, PATIENCE, documents, kustomize, manifests, with_cluster};

const OVERLAYS: [&str; 6] = ["kubeadm", "k3s", "flannel", "eks", "aks", "gke"];

/// Every directory below `overlays`, so that none is forgotten here.
#[test]
fn all_overlays_are_tested() {
    let mut found: Vec<String> = fs::read_dir(manifests().join("overlays"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut known = OVERLAYS.map(String::from).to_vec();
    known.sort();
    assert_eq!(found, known);
}

/// `MARGAY_UPDATE=1` writes them anew.
#[test]
fn the_committed_rendering_is_what_kubectl_makes_of_each_overlay() {
    for (name, below) in OVERLAYS
        .map(|name| (name, format!("overlays/{name}")))
        .into_iter()
        .chain([("cleanup", "cleanup".to_owned())])
    {
        let rendered = kustomize(&below);
        let path = manifests().join(format!("rendered/{name}.yaml"));
        if std::env::var_os("MARGAY_UPDATE").is_some() {
            fs::write(&path, &rendered).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == rendered, "{} is out of date: run with MARGAY_UPDATE=1", path.display());
        for image in rendered.lines().filter(|line| line.trim_start().starts_with("image:")) {
            let version = concat!("margay:", env!("CARGO_PKG_VERSION"));
            assert_eq!(image.trim(), format!("image: {version}"), "{name}");
        }
    }
}

#[test]
fn every_overlay_is_applied_twice_and_its_pods_are_admitted() {
    with_cluster(|cluster| {
        for name in OVERLAYS {
            let rendered = kustomize(&format!("overlays/{name}"));
            // A second time nothing conflicts and nothing changes.
            cluster.apply(&rendered).unwrap_or_else(|error| panic!("{name}: {error:#}"));
            let generation = |kind: &str| {
                let object = cluster.get("daemonset", Some(NAMESPACE), kind).unwrap();
                object["metadata"]["generation"].as_i64().unwrap()
            };
            let before = [generation("mesh-agent"), generation("mesh-datapath")];
            cluster.apply(&rendered).unwrap_or_else(|error| panic!("{name}: {error:#}"));
            assert_eq!([generation("mesh-agent"), generation("mesh-datapath")], before, "{name}");

            pods_are_admitted(cluster, name, &rendered);
        }
        cluster.apply(&kustomize("cleanup")).unwrap();
    });
}

#[test]
fn the_mesh_of_every_overlay_is_one_that_the_api_server_takes() {
    with_cluster(|cluster| {
        cluster.apply(&kustomize("base")).unwrap();
        cluster.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]).unwrap();
        let refused: Vec<String> = OVERLAYS
            .into_iter()
            .filter_map(|name| {
                let mesh =
                    fs::read_to_string(manifests().join(format!("overlays/{name}/mesh.yaml"))).unwrap();
                // That the kind is known takes a moment to come round.
                let refusal = wait::until("an answer", PATIENCE, || match cluster.apply(&mesh) {
                    Err(error) if format!("{error:#}").contains("no matches for kind") => Err(error),
                    answer => Ok(Some(answer.err())),
                });
                refusal.unwrap().map(|error| format!("{name}: {error:#}"))
            })
            .collect();
        assert!(refused.is_empty(), "{}", refused.join("\n"));
    });
}

/// What the controller would make of each DaemonSet: priority class, Pod Security and the rest of admission.
fn pods_are_admitted(cluster: &netns_tests::cluster::Cluster<'_>, overlay: &str, rendered: &str) {
    let sets: Vec<Value> =
        documents(rendered).into_iter().filter(|object| object["kind"] == "DaemonSet").collect();
    assert_eq!(sets.len(), 2, "{overlay}");
    for set in sets {
        let template = &set["spec"]["template"];
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": NAMESPACE, "generateName": "p-", "labels": template["metadata"]["labels"]},
            "spec": template["spec"],
        });
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All");
        let made = cluster.client().ask("POST", &path, Some(("application/json", &pod)));
        let made = made.unwrap_or_else(|error| panic!("{overlay}: {error:#}"));
        assert_eq!(made["spec"]["priority"], json!(2_000_001_000), "{overlay}");
        surges_do_not_clash(&set);
    }
}

/// A new pod and an old one of the datapath are on one node for a while, and with the host's network a port of theirs would
/// be the host's.
fn surges_do_not_clash(set: &Value) {
    let spec = &set["spec"];
    let surge = &spec["updateStrategy"]["rollingUpdate"]["maxSurge"];
    for container in spec["template"]["spec"]["containers"].as_array().unwrap() {
        assert_eq!(container["securityContext"]["privileged"], json!(false));
        assert_eq!(container["securityContext"]["capabilities"]["drop"], json!(["ALL"]));
        if surge == &json!(1) {
            assert!(container.get("ports").is_none());
            assert!(container.get("readinessProbe").is_some());
        }
    }
}

#[test]
fn every_generated_resource_definition_is_applied() {
    let rendered = kustomize("base");
    for entry in fs::read_dir(manifests().join("crds")).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("kustomization.yaml") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let crd: Value = serde_saphyr::from_str(&text).unwrap();
        let name = crd["metadata"]["name"].as_str().unwrap();
        assert!(rendered.contains(&format!("name: {name}\n")), "{} is in no kustomization", path.display());
    }
}
