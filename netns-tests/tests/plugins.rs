//! The standard plugins behind ours, in the list that is shipped: host ports and rates.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::{bins, two};
use netns_tests::bins::peers_dir;
use netns_tests::host::checked;
use netns_tests::lab::Lab;
use netns_tests::manifests::{self, PodStatus};
use netns_tests::netns::Netns;
use netns_tests::{spec, wait};
use serde_json::json;

const CONFLIST: &str = include_str!("../../manifests/components/cni/10-margay.conflist");
const POD: &str = "10.244.1.77";
/// Bytes a second that the pod may get.
const RATE: u64 = 1_000_000;

/// cnitool with the shipped list, for a pod that asks for a host port and a rate.
fn cnitool(lab: &Lab, verb: &str) -> anyhow::Result<String> {
    let tool = peers_dir().join("cnitool");
    let asks = json!({
        "ips": [format!("{POD}/32")],
        "portMappings": [{"hostPort": 8088, "containerPort": 8080, "protocol": "tcp"}],
        "bandwidth": {
            "ingressRate": RATE * 8, "ingressBurst": RATE, "egressRate": RATE * 8, "egressBurst": RATE,
        },
    });
    let path = format!("{}:{}", lab.bins().dir.display(), peers_dir().display());
    let output = lab
        .host("a")?
        .command(&[tool.to_str().unwrap(), verb, "margay", "/run/netns/ported"])
        .env("CNI_PATH", path)
        .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=d;K8S_POD_NAME=ported")
        .env("CAP_ARGS", asks.to_string())
        .output()?;
    checked(verb, output)
}

fn connect(from: &Netns, to: SocketAddr) -> std::io::Result<TcpStream> {
    from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(2))).unwrap()
}

#[test]
fn host_ports_and_rates_are_the_standard_plugins_work_and_policy_stays_ours() {
    for plugin in ["portmap", "bandwidth"] {
        let path = peers_dir().join(plugin);
        assert!(path.is_file(), "{} is not there: run .ci/peers", path.display());
    }
    let mut lab = Lab::up(two("externals: [{name: x, ips: [192.0.2.9]}]\n"), &bins()).unwrap();
    let host = lab.host("a").unwrap();
    host.write("/etc/cni/net.d/10-margay.conflist", CONFLIST.as_bytes()).unwrap();
    host.run(&["ip", "netns", "add", "ported"]).unwrap();
    let ip: IpAddr = POD.parse().unwrap();
    cnitool(&lab, "add").unwrap();
    cnitool(&lab, "check").unwrap();
    let pod =
        spec::Pod { namespace: "d".into(), name: "ported".into(), node: "a".into(), ..Default::default() };
    let status = PodStatus { ips: vec![ip], ..PodStatus::default() };
    lab.put(manifests::pod(&pod, &status)).unwrap();
    lab.enforced().unwrap();

    let inside = Netns::open(&lab.host("a").unwrap().path("/run/netns/ported")).unwrap();
    let listener = inside.run(|| TcpListener::bind(SocketAddr::new(ip, 8080))).unwrap().unwrap();
    let door: SocketAddr = "192.0.2.1:8088".parse().unwrap();
    // From a host that is no node, from a node, and from a pod of another node.
    let from = [
        lab.host("x").unwrap().netns().clone(),
        lab.host("b").unwrap().netns().clone(),
        lab.pod("d", "pb").unwrap().netns.clone(),
    ];
    for netns in &from {
        let mut client = connect(netns, door).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"here").unwrap();
        let mut heard = [0; 4];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"here");
    }

    // Its rate: three seconds' worth beyond the burst. Unhindered it takes milliseconds.
    let mut client = connect(&from[0], door).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let total = 4 * RATE;
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            client.write_all(&vec![7; total as usize]).unwrap();
        });
        let mut got = 0;
        let mut buffer = vec![0; 1 << 16];
        while got < total {
            got += server.read(&mut buffer).unwrap() as u64;
        }
    });
    let took = start.elapsed();
    assert!(took > Duration::from_secs(1), "{total} bytes came within {took:?}");

    // A policy of ours counts for what comes in by the host port.
    let deny = manifests::policy("d", "deny", json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
    lab.put(deny.clone()).unwrap();
    lab.enforced().unwrap();
    assert!(connect(&from[0], door).is_err());
    lab.delete(&deny).unwrap();
    lab.enforced().unwrap();
    connect(&from[0], door).unwrap();

    // Gone with the pod.
    cnitool(&lab, "del").unwrap();
    cnitool(&lab, "del").unwrap();
    wait::until("the host port to be closed", Duration::from_secs(10), || {
        Ok(connect(&from[0], door).is_err().then_some(()))
    })
    .unwrap();
    let rules = lab.host("a").unwrap().run(&["nft", "list", "ruleset"]).unwrap();
    assert!(!rules.contains("8088"), "{rules}");
    let links = lab.host("a").unwrap().run(&["ip", "-br", "link"]).unwrap();
    assert!(!links.contains("bwp"), "the plugin's own device is left: {links}");
}
