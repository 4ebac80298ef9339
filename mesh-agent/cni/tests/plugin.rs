//! The plugin from outside, against a stand-in for the agent's socket.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead as _, BufReader, IoSliceMut, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

/// A namespace that is not the test's own, held by a process that dies with its pipe.
struct Namespace(std::process::Child);

impl Namespace {
    fn new() -> Self {
        let mut child = Command::new("unshare")
            .args(["--net", "--", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the test needs the right to make a network namespace");
        Self(child)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers one request with `reply`; sends what was asked, and how many descriptors came along.
fn agent(path: &Path, reply: Value) -> mpsc::Receiver<(Value, usize)> {
    let listener = UnixListener::bind(path).unwrap();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _): (UnixStream, _) = listener.accept().unwrap();
        let mut line = vec![0; 65_536];
        let mut space = nix::cmsg_space!([i32; 4]);
        let (count, descriptors) = {
            let mut buffers = [IoSliceMut::new(&mut line)];
            let message =
                recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::empty()).unwrap();
            let descriptors = message.cmsgs().unwrap().map(|control| match control {
                ControlMessageOwned::ScmRights(list) => list.len(),
                _ => 0,
            });
            (message.bytes, descriptors.sum())
        };
        // Not every test looks at what was asked.
        let _ = sender.send((serde_json::from_slice(&line[..count]).unwrap(), descriptors));
        writeln!(stream, "{reply}").unwrap();
    });
    receiver
}

fn plugin(variables: &[(&str, &str)], input: &str) -> (i32, Value) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-cni"))
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let value = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() };
    (output.status.code().unwrap(), value)
}

fn config(socket: &Path, version: &str) -> String {
    json!({"cniVersion": version, "name": "margay", "type": "mesh-cni", "socket": socket}).to_string()
}

#[test]
fn add_passes_the_namespace_and_prints_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cni.sock");
    let namespace = Namespace::new();
    let asked = agent(
        &socket,
        json!({"outcome": "done", "result": {"hostInterface": "mgy0", "hostMac": "ee:ee:ee:ee:ee:ee",
               "podMac": "02:00:00:00:00:01", "addresses": ["10.1.0.5/32"], "gateways": ["169.254.1.1"], "mtu": 1420}}),
    );
    let (code, result) = plugin(
        &[
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", &namespace.path()),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=x;K8S_POD_NAME=a;K8S_POD_UID=u;IP=10.1.0.5"),
        ],
        &config(&socket, "1.0.0"),
    );
    assert_eq!((code, &result["ips"][0]["address"]), (0, &json!("10.1.0.5/32")), "{result}");
    let (request, descriptors) = asked.recv().unwrap();
    assert_eq!(descriptors, 1);
    for (key, expected) in [
        ("command", json!("ADD")),
        ("containerId", json!("c1")),
        ("ifname", json!("eth0")),
        ("network", json!("margay")),
        ("podNamespace", json!("x")),
        ("podName", json!("a")),
        ("podUid", json!("u")),
        ("ips", json!(["10.1.0.5"])),
    ] {
        assert_eq!(request[key], expected, "{key}");
    }
}

#[test]
fn the_agents_refusal_reaches_the_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cni.sock");
    agent(&socket, json!({"outcome": "failed", "code": 50, "message": "no pod CIDR", "details": "Node/a"}));
    let (code, error) = plugin(&[("CNI_COMMAND", "STATUS")], &config(&socket, "1.1.0"));
    assert_eq!(code, 1);
    assert_eq!(error, json!({"cniVersion": "1.1.0", "code": 50, "msg": "no pod CIDR", "details": "Node/a"}));
}

#[test]
fn without_an_agent_add_and_del_ask_to_be_called_again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let namespace = Namespace::new();
    for command in ["ADD", "DEL"] {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", &namespace.path()),
            ("CNI_IFNAME", "eth0"),
        ];
        let (code, error) = plugin(&variables, &config(&socket, "1.0.0"));
        assert_eq!((code, &error["code"]), (1, &json!(11)), "{command}: {error}");
    }
    let (_, error) = plugin(&[("CNI_COMMAND", "STATUS")], &config(&socket, "1.1.0"));
    assert_eq!(error["code"], 50);
}

#[test]
fn add_refuses_what_is_no_namespace_or_the_hosts_own() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    for netns in ["/proc/self/ns/net", "/etc/passwd", "/nonexistent", ""] {
        let variables =
            [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_NETNS", netns), ("CNI_IFNAME", "eth0")];
        let (code, error) = plugin(&variables, &config(&socket, "1.0.0"));
        assert_eq!((code, &error["code"]), (1, &json!(4)), "{netns:?}: {error}");
    }
}

#[test]
fn chained_it_passes_on_what_the_plugin_before_it_made_and_needs_no_agent() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let before = json!({"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/x"}],
        "ips": [{"address": "10.244.1.2/24", "interface": 0}]});
    let config = |before: Option<&Value>| {
        let mut config: Value = serde_json::from_str(&config(&socket, "1.0.0")).unwrap();
        config["chained"] = json!(true);
        if let Some(before) = before {
            config["prevResult"] = before.clone();
        }
        config.to_string()
    };
    let call = |command: &str, before: Option<&Value>| {
        let variables = [("CNI_COMMAND", command), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")];
        plugin(&variables, &config(before))
    };
    assert_eq!(call("ADD", Some(&before)), (0, before.clone()));
    assert_eq!(call("CHECK", Some(&before)), (0, Value::Null));
    assert_eq!(call("DEL", None), (0, Value::Null));
    for command in ["ADD", "CHECK"] {
        let (code, error) = call(command, None);
        assert_eq!((code, &error["code"]), (1, &json!(7)), "{command}: {error}");
    }
    let status: Value = serde_json::from_str(&config(None)).unwrap();
    let status = json!({"cniVersion": "1.1.0", "chained": true, "name": "m", "socket": status["socket"]});
    let (code, error) = plugin(&[("CNI_COMMAND", "STATUS")], &status.to_string());
    assert_eq!((code, &error["code"]), (1, &json!(50)), "{error}");
}

/// The installer as a process: killed at any moment, then run to its end, beside a program that runs.
#[test]
fn an_installer_that_is_killed_leaves_old_or_new_files_and_a_running_plugin_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = |below: &str| dir.path().join(below);
    for below in ["bin", "conf"] {
        std::fs::create_dir(path(below)).unwrap();
    }
    let list =
        |name: &str| format!(r#"{{"cniVersion":"1.0.0","name":"{name}","plugins":[{{"type":"mesh-cni"}}]}}"#);
    let install = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-cni"));
        command.arg("install").arg("--bin-dir").arg(path("bin")).arg("--conf-dir").arg(path("conf"));
        command.arg("--conflist").arg(path("10-m.conflist")).env_remove("CNI_COMMAND");
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let own = std::fs::read(env!("CARGO_BIN_EXE_mesh-cni")).unwrap();
    // An older version of the plugin, which is running: waits for its standard input.
    let mut older = own.clone();
    older.extend_from_slice(b"older");
    std::fs::write(path("10-m.conflist"), list("first")).unwrap();
    assert!(install().status().unwrap().success());
    std::fs::write(path("bin/mesh-cni"), &older).unwrap();
    let mut older_one = Command::new(path("bin/mesh-cni"));
    older_one.env("CNI_COMMAND", "VERSION").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut running = loop {
        match older_one.spawn() {
            // A process that another test has just begun may still have the file open as we wrote it.
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
            other => break other.unwrap(),
        }
    };
    let name_of = || {
        let text = std::fs::read(path("conf/10-m.conflist")).unwrap();
        let list: Value = serde_json::from_slice(&text).expect("half a list");
        list["name"].as_str().unwrap().to_owned()
    };
    for round in 0..40 {
        let (before, after) = (name_of(), format!("round{round}"));
        std::fs::write(path("10-m.conflist"), list(&after)).unwrap();
        let mut child = install().spawn().unwrap();
        // The moments are spread over what a whole run takes.
        let until = std::time::Instant::now() + std::time::Duration::from_micros(round * 250);
        while std::time::Instant::now() < until {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let now = name_of();
        assert!(now == before || now == after, "{now}");
        let binary = std::fs::read(path("bin/mesh-cni")).unwrap();
        assert!(binary == own || binary == older, "half a plugin");
        assert!(now == before || binary == own, "the list came before the plugin");
    }
    let output = install().output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read(path("bin/mesh-cni")).unwrap(), own);
    // The one that runs has its own file still.
    running.stdin.take().unwrap().write_all(br#"{"cniVersion":"1.0.0"}"#).unwrap();
    let output = running.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout.starts_with(b"{"), "{output:?}");

    let mut uninstall = Command::new(env!("CARGO_BIN_EXE_mesh-cni"));
    uninstall.arg("uninstall").arg("--bin-dir").arg(path("bin")).arg("--conf-dir").arg(path("conf"));
    assert!(uninstall.stdout(Stdio::null()).status().unwrap().success());
    for below in ["bin", "conf"] {
        assert_eq!(std::fs::read_dir(path(below)).unwrap().count(), 0, "{below}");
    }
}

#[test]
fn bad_calls_get_the_specifications_codes() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(&dir.path().join("none.sock"), "1.1.0");
    let old = config(&dir.path().join("none.sock"), "0.3.1");
    let cases: [(&str, &str, u64); 7] = [
        ("", &good, 4),
        ("FROB", &good, 4),
        ("STATUS", "not json", 6),
        ("STATUS", r#"{"cniVersion":"7.0.0","name":"m"}"#, 1),
        ("STATUS", &old, 1),
        ("GC", &good, 7),
        ("STATUS", r#"{"cniVersion":"1.1.0"}"#, 7),
    ];
    for (command, input, expected) in cases {
        let (code, error) = plugin(&[("CNI_COMMAND", command)], input);
        assert_eq!((code, error["code"].as_u64()), (1, Some(expected)), "{command} {input}: {error}");
        assert!(!error["msg"].as_str().unwrap().is_empty());
    }
}

#[test]
fn version_needs_no_agent() {
    let (code, answer) = plugin(&[("CNI_COMMAND", "VERSION")], r#"{"cniVersion":"0.4.0"}"#);
    assert_eq!((code, &answer["cniVersion"]), (0, &json!("0.4.0")));
    assert!(answer["supportedVersions"].as_array().unwrap().contains(&json!("1.1.0")));
}
