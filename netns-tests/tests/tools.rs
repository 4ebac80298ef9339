//! What a person runs: the demo, a lab that stays up, conformance, and the stock CNI tool.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{bins, two};
use netns_tests::bins::peers_dir;
use netns_tests::lab::Lab;
use netns_tests::leaks::{self, Machine};
use netns_tests::wait;

const MESH_LAB: &str = env!("CARGO_BIN_EXE_mesh-lab");

fn here(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn mesh_lab(arguments: &[&str]) -> Output {
    Command::new(MESH_LAB).args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn the_demo_shows_a_mesh_and_leaves_nothing() {
    let output = mesh_lab(&["demo"]);
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    for word in ["every pod reaches every pod", "Mbit/s", "blue-only", "nothing is left", "UDP 51820"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

#[test]
fn an_aborted_demo_leaves_nothing() {
    let before = Machine::look().unwrap();
    let mut demo = Command::new(MESH_LAB).arg("demo").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    let found = lines.by_ref().map_while(Result::ok).any(|line| line.contains("gave six pods"));
    assert!(found, "the demo ended before its pods were there");
    // Everything below it, by parent: the holders and what runs in them.
    let family = descendants(demo.id());
    assert!(family.len() >= 8, "{family:?}");
    demo.kill().unwrap();
    demo.wait().unwrap();
    wait::until("everything of the demo to be gone", Duration::from_secs(10), || {
        let mut left: Vec<String> = family
            .iter()
            .filter(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists())
            .map(|pid| pid.to_string())
            .collect();
        left.extend(before.difference(&Machine::look()?));
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
    .unwrap();
}

/// A run of the bench with its figures in a file.
fn bench(arguments: &[&str]) -> (Output, serde_json::Value) {
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("bench.json");
    let output = mesh_lab(&[&["bench", "--quick", "--json", json.to_str().unwrap()], arguments].concat());
    let text = std::fs::read(json).unwrap_or_else(|_| b"null".to_vec());
    (output, serde_json::from_slice(&text).unwrap())
}

#[test]
fn a_bench_measures_what_goes_through_the_tunnel_and_leaves_nothing() {
    let before = Machine::look().unwrap();
    let (output, json) = bench(&["--rounds", "2", "--only", "veth,margay", "--parts", "tcp,udp,ping"]);
    assert!(output.status.success(), "{}", text(&output));
    let table = text(&output);
    for word in ["TCP, Mbit/s received", "kpps", "ping, µs", "Goals"] {
        assert!(table.contains(word), "no {word:?} in {table}");
    }
    let number = |metric: &str, contestant: &str| {
        let entry = &json["metrics"][metric]["contestants"][contestant];
        assert_eq!(entry["rounds"].as_array().unwrap().len(), 2, "{metric} of {contestant}");
        entry["median"].as_f64().unwrap()
    };
    for contestant in ["veth", "margay"] {
        assert!(number("tcp1_forward_mbit_s", contestant) > 10.0);
        assert!(number("ping_idle_average_us", contestant) > 1.0);
        assert!(number("udp_25k_sent_kpps", contestant) >= number("udp_25k_received_kpps", contestant));
        assert_eq!(number("udp_25k_late", contestant), 0.0, "datagrams overtook each other");
    }
    // Sealing costs something, and only daemons that ran have used a CPU.
    assert!(number("tcp1_forward_daemon_cpu_ms_per_gb", "margay") > 1.0);
    let left = before.difference(&Machine::look().unwrap());
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_contestant_that_does_not_start_fails_the_bench_unless_it_is_left_out() {
    let (output, json) = bench(&["--only", "veth", "--parts", "ping", "--other", "/bin/false"]);
    assert!(!output.status.success() && json.is_null(), "{}", text(&output));
    assert!(text(&output).contains("other"), "{}", text(&output));
    let out = ["--only", "veth", "--parts", "ping", "--other", "/bin/false", "--without", "other"];
    let (output, _) = bench(&out);
    assert!(output.status.success(), "{}", text(&output));
}

fn descendants(root: u32) -> Vec<u32> {
    let mut family = vec![root];
    let mut index = 0;
    while let Some(pid) = family.get(index).copied() {
        index += 1;
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            family.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    family
}

#[test]
fn a_lab_stays_up_until_it_is_taken_down() {
    let directory = tempfile::tempdir().unwrap();
    let name = format!("stay-{}", std::process::id());
    let file = directory.path().join("lab.yaml");
    std::fs::write(
        &file,
        serde_json::to_vec(&netns_tests::spec::Lab { name: name.clone(), ..two("") }).unwrap(),
    )
    .unwrap();
    let up = mesh_lab(&["up", file.to_str().unwrap()]);
    assert!(up.status.success(), "{}", text(&up));
    let exec = |arguments: &[&str]| mesh_lab(&[&["exec", "--lab", &name], arguments].concat());
    assert_eq!(text(&exec(&["node/b", "--", "hostname"])).trim(), "b");
    assert_eq!(exec(&["pod/d/pa", "--", "sh", "-c", "exit 7"]).status.code(), Some(7));
    let address = exec(&["pod/d/pb", "--", "ip", "-o", "-4", "addr", "show", "eth0"]);
    let address = text(&address).split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_string();
    let ping = |count: &str| {
        exec(&["pod/d/pa", "--", "ping", "-c", count, "-W", "1", "-i", "0.2", &address]).status.success()
    };
    assert!(ping("3"));
    let wg = text(&exec(&["node/a", "--", "wg", "show"]));
    assert!(
        wg.contains("margay0") && wg.contains("latest handshake") && !wg.contains("private key: A"),
        "{wg}"
    );
    let twice = mesh_lab(&["up", file.to_str().unwrap()]);
    assert!(!twice.status.success() && text(&twice).contains("is up already"), "{}", text(&twice));
    let status = text(&mesh_lab(&["status", "--lab", &name]));
    assert!(
        status.contains("a: d/pa") && status.contains("b: d/pb") && status.contains("margay0"),
        "{status}"
    );
    assert!(mesh_lab(&["link", "--lab", &name, "a", "b", "cut"]).status.success());
    assert!(!ping("2"));
    assert!(mesh_lab(&["link", "--lab", &name, "a", "b", "heal"]).status.success());
    wait::until("the link to heal", Duration::from_secs(20), || Ok(ping("1").then_some(()))).unwrap();
    let wrong = exec(&["node/z", "--", "true"]);
    assert!(text(&wrong).contains("no host z"), "{}", text(&wrong));
    let down = mesh_lab(&["down", "--lab", &name]);
    assert!(down.status.success(), "{}", text(&down));
    assert!(!text(&mesh_lab(&["status", "--lab", &name])).contains("kept by"));
}

#[test]
fn a_wrong_lab_file_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("wrong.yaml");
    std::fs::write(&file, "name: x\nnodes: [{name: a, ips: [1.2.3.4], colour: red}]\n").unwrap();
    let output = mesh_lab(&["up", file.to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(text(&output).contains("wrong.yaml") && text(&output).contains("colour"), "{}", text(&output));
}

/// How many cases there are.
fn cases() -> usize {
    let files = ["cases/ipv4.json", "cases/ipv6.json"].map(|file| std::fs::read(here(file)).unwrap());
    files.iter().map(|file| serde_json::from_slice::<Vec<serde_json::Value>>(file).unwrap().len()).sum()
}

#[test]
fn the_projects_own_cases_pass_over_ipv4_and_ipv6() {
    let output = mesh_lab(&[
        "conformance",
        here("cases/ipv4.json").to_str().unwrap(),
        here("cases/ipv6.json").to_str().unwrap(),
    ]);
    let text = text(&output);
    assert!(output.status.success() && text.trim_end().ends_with(" passed, 0 failed"), "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("ok ")).count(), cases(), "{text}");
}

#[test]
fn conformance_fails_a_case_with_a_wrong_expectation_and_names_the_probe() {
    let mut cases: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(here("cases/ipv4.json")).unwrap()).unwrap();
    cases.truncate(1);
    cases[0]["steps"].as_array_mut().unwrap().truncate(1);
    let expected = cases[0]["steps"][0]["expected"].as_array_mut().unwrap();
    for (probe, to) in [(0, true), (8, false)] {
        assert_ne!(expected[probe][4], to);
        expected[probe][4] = to.into();
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("wrong.json");
    std::fs::write(&file, serde_json::to_vec(&cases).unwrap()).unwrap();
    let output = mesh_lab(&["conformance", file.to_str().unwrap()]);
    let text = text(&output);
    assert!(!output.status.success() && text.trim_end().ends_with("0 passed, 1 failed"), "{text}");
    assert_eq!(text.matches("expected allowed, got dropped").count(), 1, "{text}");
    assert_eq!(text.matches("expected dropped, got allowed").count(), 1, "{text}");
}

#[test]
fn stock_cnitool_adds_checks_and_deletes_a_pod() {
    let tool = peers_dir().join("cnitool");
    assert!(tool.is_file(), "{} is not there: run .ci/peers", tool.display());
    let lab = Lab::up(two(""), &bins()).unwrap();
    let host = lab.host("a").unwrap();
    // cnitool names the container by the namespace's path; older ones do not know version 1.1 of CNI.
    let list = serde_json::json!({"cniVersion": "1.0.0", "name": "margay", "plugins": [{"type": "mesh-cni", "capabilities": {"ips": true}}]});
    host.write("/etc/cni/net.d/10-margay.conflist", list.to_string().as_bytes()).unwrap();
    host.run(&["ip", "netns", "add", "stock"]).unwrap();
    let cni = |verb: &str| {
        let output = host
            .command(&[tool.to_str().unwrap(), verb, "margay", "/run/netns/stock"])
            .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=d;K8S_POD_NAME=stock")
            .env("CAP_ARGS", r#"{"ips": ["10.244.1.77/32"]}"#)
            .output()
            .unwrap();
        (output.status.success(), text(&output))
    };
    let (good, added) = cni("add");
    assert!(good && added.contains("10.244.1.77/32"), "{added}");
    let (good, checked) = cni("check");
    assert!(good, "{checked}");
    let inside =
        lab.host("a").unwrap().pod_command("stock", &["ip", "-o", "addr", "show", "eth0"]).output().unwrap();
    assert!(text(&inside).contains("10.244.1.77/32"), "{}", text(&inside));
    lab.host("a")
        .unwrap()
        .run(&[
            "sh",
            "-c",
            "ip netns exec stock ip link set eth0 down && ip netns exec stock ip addr flush dev eth0",
        ])
        .unwrap();
    let (good, broken) = cni("check");
    assert!(!good, "CHECK must see that the address is gone: {broken}");
    let (good, deleted) = cni("del");
    assert!(good, "{deleted}");
    let (good, again) = cni("del");
    assert!(good, "DEL twice is fine: {again}");
    let links = host.run(&["ip", "-br", "link"]).unwrap();
    assert_eq!(links.lines().filter(|line| line.starts_with("mgy")).count(), 1, "{links}");
    host.run(&["ip", "netns", "del", "stock"]).unwrap();
}

#[test]
fn nothing_of_ours_runs_on_the_machine_itself() {
    // The mark is on everything a lab starts; after its end nobody bears it.
    let lab = Lab::up(two(""), &bins()).unwrap();
    let (run, namespaces) = (lab.bins().run.clone(), lab.namespaces().unwrap());
    let running = leaks::left(&run, &namespaces).unwrap();
    for program in ["mesh-agent", "mesh-datapath", "mesh-lab"] {
        assert!(running.iter().any(|line| line.contains(program)), "{running:?}");
    }
    drop(lab);
    wait::until("all to be gone", Duration::from_secs(10), || {
        let left = leaks::left(&run, &namespaces)?;
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
    .unwrap();
}
