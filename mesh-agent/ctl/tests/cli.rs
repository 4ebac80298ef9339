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
    "waiting":[],"blocked":null,"settled":true}}"#;

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
