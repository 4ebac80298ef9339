//! The program from outside: what it prints and how it exits, against a stand-in for the agent's socket.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

const STATUS: &str = r#"{"node":"alpha","version":"0.1.0","uptimeSeconds":5,
  "generation":{"snapshot":3,"enforced":3,"policy":3},
  "devices":[],"peers":[],"sources":[],"reconcilers":[],"endpoints":[],
  "issues":[{"object":"Node/b","field":"","reason":"DuplicateKey","message":"it is alpha's"}],
  "rotation":{"phase":"steady","keys":[],"ageSeconds":null,"rotationEpoch":0,"dueSeconds":null,"completed":0,
    "waiting":[],"blocked":null,"settled":true},"announcementTrust":"admission"}"#;

/// Answers every request on `path` with `status` and `body`, until the test ends.
fn serve(path: &Path, status: &'static str, body: &'static str) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let mut chunk = [0; 1024];
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                let count = stream.read(&mut chunk).unwrap();
                request.extend_from_slice(&chunk[..count]);
            }
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).unwrap();
        }
    });
}

fn meshctl(socket: &Path, args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_meshctl"))
        .env_remove("MARGAY_SOCKET")
        .arg("--socket")
        .arg(socket)
        .args(args)
        .output()
        .unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn without_an_agent_it_says_so_and_exits_3() {
    let dir = tempfile::tempdir().unwrap();
    let (code, out, err) = meshctl(&dir.path().join("none.sock"), &["status"]);
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.contains("mesh-agent is not running") && err.contains("systemctl start mesh-agent"), "{err}");
}

#[test]
fn check_exits_1_on_an_issue_and_plain_status_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a.sock");
    serve(&socket, "200 OK", STATUS);
    let (code, out, _) = meshctl(&socket, &["status"]);
    assert_eq!(code, 0);
    assert!(out.contains("DuplicateKey"), "{out}");
    assert_eq!(meshctl(&socket, &["status", "--check"]).0, 1);
}

#[test]
fn json_and_yaml_carry_the_whole_answer() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a.sock");
    serve(&socket, "200 OK", STATUS);
    let (_, json, _) = meshctl(&socket, &["status", "-o", "json"]);
    let given: serde_json::Value = serde_json::from_str(STATUS).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), given);
    let (_, yaml, _) = meshctl(&socket, &["status", "-o", "yaml"]);
    assert_eq!(serde_saphyr::from_str::<serde_json::Value>(&yaml).unwrap(), given);
}

#[test]
fn an_order_to_change_keys_is_answered_and_a_refused_one_exits_5() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a.sock");
    serve(&socket, "200 OK", r#"{"epoch":7,"file":"/m/mesh.yaml","blocked":null}"#);
    let (code, out, _) = meshctl(&socket, &["keys", "rotate", "--all"]);
    assert_eq!(
        (code, out.trim()),
        (0, "/m/mesh.yaml asks all nodes for epoch 7; `meshctl keys` shows how far it is")
    );
    let (code, out, _) = meshctl(&socket, &["keys", "rotate", "-o", "json"]);
    assert_eq!(
        (code, serde_json::from_str::<serde_json::Value>(&out).unwrap()["epoch"].as_u64()),
        (0, Some(7))
    );
    let refusing = dir.path().join("b.sock");
    serve(&refusing, "403 Forbidden", r#"{"error":"only on control.sock"}"#);
    let (code, _, err) = meshctl(&refusing, &["keys", "rotate"]);
    assert!(code == 5 && err.contains("only on control.sock"), "{code} {err}");
}

#[test]
fn the_agents_own_error_is_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a.sock");
    serve(&socket, "503 Service Unavailable", r#"{"error":"not synced yet"}"#);
    let (code, _, err) = meshctl(&socket, &["peers"]);
    assert_eq!(code, 5);
    assert!(err.contains("not synced yet"), "{err}");
}

#[test]
fn an_answer_that_breaks_off_is_an_absent_agent() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || drop(listener.accept()));
    assert_eq!(meshctl(&socket, &["peers"]).0, 3);
}

#[test]
fn a_wrong_command_line_exits_2() {
    assert_eq!(meshctl(Path::new("/nonexistent"), &["peers", "--no-such-flag"]).0, 2);
    assert_eq!(meshctl(Path::new("/nonexistent"), &["status", "--watch=-1"]).0, 2);
}

/// Runs `meshctl install` with a kubectl that writes down how it is called and what it is given.
fn install(dir: &Path, args: &[&str], present: &str, code: u8) -> (i32, String, String) {
    use std::os::unix::fs::PermissionsExt as _;
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> {0}/calls\ncase $1 in apply) cat >> {0}/input;; get) printf '{present}';; esac\nexit {code}\n",
        dir.display()
    );
    let kubectl = dir.join("kubectl");
    std::fs::write(&kubectl, script).unwrap();
    std::fs::set_permissions(&kubectl, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_meshctl"))
        .arg("install")
        .args(args)
        .env("PATH", format!("{}:/usr/bin:/bin", dir.display()))
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_dry_run_prints_manifests_and_mesh_and_calls_nobody() {
    let dir = tempfile::tempdir().unwrap();
    for overlay in ["kubeadm", "k3s", "flannel", "eks", "aks", "gke"] {
        let args = ["--dry-run", "--overlay", overlay, "--image", "registry.test/margay:7"];
        let (code, out, err) = install(dir.path(), &args, "", 1);
        assert_eq!((code, err.as_str()), (0, ""), "{overlay}");
        let documents: Vec<serde_json::Value> =
            out.split("\n---\n").map(|text| serde_saphyr::from_str(text).unwrap()).collect();
        let kinds: Vec<&str> = documents.iter().map(|document| document["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds.iter().filter(|kind| **kind == "DaemonSet").count(), 2, "{overlay}");
        assert_eq!(kinds.last(), Some(&"MeshConfiguration"), "{overlay}");
        assert!(
            out.contains("image: registry.test/margay:7") && !out.contains("image: margay:"),
            "{overlay}"
        );
    }
    assert!(!dir.path().join("calls").exists());
    assert_eq!(install(dir.path(), &["--dry-run", "--overlay", "minikube"], "", 0).0, 2);
    assert_eq!(install(dir.path(), &["--dry-run", "--image", "a b"], "", 0).0, 2);
}

#[test]
fn without_a_dry_run_kubectl_applies_and_a_mesh_that_is_there_stays() {
    let calls = |dir: &Path| std::fs::read_to_string(dir.join("calls")).unwrap();
    let input = |dir: &Path| std::fs::read_to_string(dir.join("input")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(install(dir.path(), &["--overlay", "k3s"], "", 0).0, 0);
    assert_eq!(
        calls(dir.path()),
        "apply --server-side -f -\nwait --for=condition=Established crd/meshconfigurations.margay.io --timeout=60s\n\
         get meshconfigurations.margay.io --ignore-not-found -o name\napply --server-side -f -\n"
    );
    assert!(input(dir.path()).contains("10.42.0.0/16"));

    let dir = tempfile::tempdir().unwrap();
    let (code, out, _) = install(dir.path(), &["--overlay", "k3s"], "meshconfiguration/default", 0);
    assert!(code == 0 && out.contains("stays as it is"), "{out}");
    assert!(!input(dir.path()).contains("10.42.0.0/16"));

    let dir = tempfile::tempdir().unwrap();
    let mesh = dir.path().join("mine.yaml");
    std::fs::write(&mesh, "kind: Mine\n").unwrap();
    let (code, ..) = install(dir.path(), &["--mesh", mesh.to_str().unwrap()], "meshconfiguration/default", 0);
    assert!(code == 0 && input(dir.path()).contains("kind: Mine"));

    let (code, _, err) = install(dir.path(), &["--mesh", "/none/mesh.yaml"], "", 0);
    assert!(code == 1 && err.contains("/none/mesh.yaml"), "{err}");
    let (code, _, err) = install(dir.path(), &[], "", 3);
    assert!(code == 1 && err.contains("kubectl apply --server-side"), "{err}");
    let output =
        Command::new(env!("CARGO_BIN_EXE_meshctl")).arg("install").env("PATH", "/none").output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(1) && err.contains("kubectl: is not on this machine's PATH"),
        "{err}"
    );
}
