//! One suite for every implementation of `Datapath`: what holds for the device in memory, which the
//! reconciler's tests trust, holds for mesh-datapath over its socket, and for the kernel over netlink.
//!
//! The tests of the kernel need one with WireGuard: netns-tests/tests/kernel.rs runs this program in a virtual machine.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command};

use common::{eventually, in_namespaces, run};
use ipnet::IpNet;
use keyservice::{PresharedKey, PrivateKey, PublicKey};
use mesh_agent::desired::{self, Desired, Link, WireguardDevice, WireguardPeer};
use mesh_agent::reconcile::Reconciler as _;
use mesh_agent::reconcile::links::{LeftoverReconciler, LinkReconciler};
use mesh_agent::reconcile::netlink::Netlink;
use mesh_agent::reconcile::wireguard::WireguardReconciler;
use mesh_agent::wireguard::{
    Datapath, DatapathError, Datapaths, Kernel, KeyRing, Live, MemoryDatapath, NodeDatapaths,
    UserspaceDatapath, UserspaceDatapaths,
};
use mesh_uapi::{Op, PeerUpdate};

const SOCKET: &str = "/var/run/wireguard/margay0.sock";

/// A mesh-datapath in the test's namespaces; ends with it.
struct Process(Child);

impl Process {
    async fn start() -> Self {
        // The socket's directory is the machine's: have one of our own.
        let run_dir = std::fs::canonicalize("/var/run").unwrap();
        run(&format!("mount -t tmpfs margay-test {}", run_dir.display()));
        let mut process = Self::spawn();
        process.answers().await;
        process
    }

    fn spawn() -> Self {
        let beside = std::env::current_exe().unwrap();
        let program: PathBuf = beside.parent().unwrap().parent().unwrap().join("mesh-datapath");
        assert!(program.is_file(), "{} is not built: cargo build --release", program.display());
        let child = Command::new(program).args(["--foreground", "--persist", "margay0"]).spawn().unwrap();
        Self(child)
    }

    async fn answers(&mut self) {
        eventually("mesh-datapath answers", async || UserspaceDatapath::new(SOCKET).read().await.is_ok())
            .await;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn own() -> PrivateKey {
    PrivateKey::from_bytes(&[7; 32])
}

fn key(n: u8) -> PublicKey {
    PrivateKey::from_bytes(&[n; 32]).public()
}

fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn add(prefixes: &[&str]) -> PeerUpdate {
    PeerUpdate { add_allowed_ips: nets(prefixes), ..PeerUpdate::default() }
}

async fn conformance(datapath: &dyn Datapath) {
    let read = async || datapath.read().await.unwrap();
    let apply = async |ops: Vec<Op>| datapath.apply(ops).await.unwrap();
    let fresh = read().await;
    assert!(fresh.public_key.is_none() && fresh.peers.is_empty());

    // Key, port.
    apply(vec![Op::SetPrivateKey(own()), Op::SetListenPort(51999)]).await;
    let device = read().await;
    assert_eq!((device.public_key, device.listen_port), (Some(own().public()), 51999));

    // A peer appears with everything that was said of it.
    let endpoint: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let update = PeerUpdate {
        endpoint: Some(endpoint),
        persistent_keepalive: Some(25),
        preshared_key: Some(PresharedKey::from_bytes([1; 32])),
        ..add(&["10.1.0.0/24", "10.9.0.0/24", "fd00:1::/64"])
    };
    apply(vec![Op::SetPeer(key(1), update), Op::SetPeer(key(2), add(&["10.2.0.0/24"]))]).await;
    let peer = read().await.peers[&key(1)].clone();
    assert_eq!((peer.endpoint, peer.persistent_keepalive), (Some(endpoint), 25));
    assert_eq!(peer.allowed_ips, nets(&["10.1.0.0/24", "10.9.0.0/24", "fd00:1::/64"]));
    assert!(peer.has_preshared_key && peer.last_handshake.is_none());

    // What is not said stays; an all-zero preshared key is none.
    let none = PresharedKey::from_bytes([0; 32]);
    apply(vec![Op::SetPeer(key(1), PeerUpdate { preshared_key: Some(none), ..PeerUpdate::default() })]).await;
    let after = read().await.peers[&key(1)].clone();
    assert_eq!((after.has_preshared_key, after.endpoint), (false, Some(endpoint)));
    assert_eq!((after.persistent_keepalive, &after.allowed_ips), (25, &peer.allowed_ips));

    // A prefix moves by one operation on its new owner, and single ones can be taken away.
    apply(vec![Op::SetPeer(key(2), add(&["10.9.0.0/24"]))]).await;
    let device = read().await;
    assert_eq!(device.peers[&key(1)].allowed_ips, nets(&["10.1.0.0/24", "fd00:1::/64"]));
    assert_eq!(device.peers[&key(2)].allowed_ips, nets(&["10.2.0.0/24", "10.9.0.0/24"]));
    let removal = PeerUpdate { remove_allowed_ips: nets(&["fd00:1::/64"]), ..PeerUpdate::default() };
    apply(vec![Op::SetPeer(key(1), removal)]).await;
    assert_eq!(read().await.peers[&key(1)].allowed_ips, nets(&["10.1.0.0/24"]));

    // An update of a peer that is not there makes none, nor does our own key.
    let update = PeerUpdate { update_only: true, ..add(&["10.3.0.0/24"]) };
    apply(vec![Op::SetPeer(key(3), update), Op::SetPeer(own().public(), add(&["10.4.0.0/24"]))]).await;
    assert_eq!(read().await.peers.len(), 2);

    // And all of it goes again.
    apply(vec![Op::RemovePeer(key(1)), Op::RemovePeer(key(1)), Op::RemovePeer(key(2)), Op::ClearPrivateKey])
        .await;
    let device = read().await;
    assert!(device.public_key.is_none() && device.peers.is_empty());
}

fn wish() -> Desired {
    let peer = |n: u8| WireguardPeer {
        name: format!("node-{n}"),
        endpoint: format!("127.0.0.1:{}", 9000 + u16::from(n)).parse().ok(),
        allowed_ips: nets(&[&format!("10.{n}.0.0/24"), &format!("fd00:{n}::/64")]),
        persistent_keepalive: 0,
        learned: false,
        reach: Default::default(),
        connect: false,
    };
    let device = WireguardDevice {
        public_key: own().public(),
        listen_port: 51998,
        fwmark: 0,
        preshared: false,
        peers: (1..=3).map(|n| (key(n), peer(n))).collect(),
    };
    Desired { prune: true, wireguard: [("margay0".to_owned(), device)].into(), ..Desired::default() }
}

fn agent() -> WireguardReconciler {
    WireguardReconciler::new(Box::<UserspaceDatapaths>::default(), KeyRing::new([own()]))
}

#[tokio::test]
async fn the_device_in_memory_conforms() {
    conformance(&MemoryDatapath::default()).await;
}

#[test]
fn mesh_datapath_conforms() {
    in_namespaces(async || {
        let _process = Process::start().await;
        let datapath = UserspaceDatapath::new(SOCKET);
        conformance(&datapath).await;
        assert!(datapath.stats().await.unwrap().is_some());
        assert_eq!(UserspaceDatapaths::default().names(), ["margay0"]);
    });
}

#[test]
fn a_new_agent_takes_a_running_datapath_over_without_an_operation() {
    in_namespaces(async || {
        let _process = Process::start().await;
        let first = agent().reconcile(&wish()).await.unwrap();
        assert!(first.operations > 0 && first.errors.is_empty(), "{first:?}");
        let second = agent().reconcile(&wish()).await.unwrap();
        assert!(second.operations == 0 && second.errors.is_empty(), "{second:?}");
    });
}

#[test]
fn a_datapath_that_was_killed_gets_everything_again() {
    in_namespaces(async || {
        let process = Process::start().await;
        let mut agent = agent();
        agent.reconcile(&wish()).await.unwrap();
        drop(process);
        let error = UserspaceDatapath::new(SOCKET).read().await.unwrap_err();
        assert!(matches!(error, DatapathError::Absent(_)), "{error}");
        let report = agent.reconcile(&wish()).await.unwrap();
        assert!(report.errors[0].to_string().contains("is mesh-datapath@margay0 running?"), "{report:?}");
        let mut process = Process::spawn();
        process.answers().await;
        assert!(agent.reconcile(&wish()).await.unwrap().errors.is_empty());
        let device = UserspaceDatapath::new(SOCKET).read().await.unwrap();
        assert_eq!(device.peers.len(), 3);
        assert!(device.peers.values().all(|peer| peer.endpoint.is_some() && peer.allowed_ips.len() == 2));
    });
}

const NEEDS_KERNEL: &str = "this kernel has no WireGuard: the test belongs into a guest";

/// The reconciler's links, kind and all.
fn kernel_wish() -> Desired {
    let links = [("margay0".to_owned(), Link { mtu: 1420, up: true })].into();
    Desired { links, datapath: desired::Datapath::Kernel, ..wish() }
}

fn kernel_agent(netlink: &Netlink) -> (LinkReconciler, WireguardReconciler) {
    let live = Live::default();
    let datapaths = Box::new(NodeDatapaths::new(netlink.clone()));
    let devices = WireguardReconciler::new(datapaths, KeyRing::new([own()])).with_live(live.clone());
    (LinkReconciler::new(netlink.clone()).with_live(live), devices)
}

#[test]
#[ignore = "needs kernel WireGuard: netns-tests/tests/kernel.rs runs it in a guest"]
fn kernel_device_conforms() {
    in_namespaces(async || {
        let kernel = Kernel::new();
        assert!(kernel.has_wireguard().unwrap(), "{NEEDS_KERNEL}");
        let error = kernel.open("margay0").read().await.unwrap_err();
        assert!(matches!(&error, DatapathError::Absent(text) if text.contains("margay0")), "{error}");
        let (mut links, _) = kernel_agent(&Netlink::connect().unwrap());
        let report = links.reconcile(&kernel_wish()).await.unwrap();
        assert!(report.errors.is_empty(), "{report:?}");
        conformance(&kernel.open("margay0")).await;
        assert!(kernel.open("margay0").stats().await.unwrap().is_none());
        let error = kernel.open("lo").read().await.unwrap_err();
        assert!(matches!(&error, DatapathError::Failed(text) if text.contains("(os error 95)")), "{error}");
    });
}

#[test]
#[ignore = "needs kernel WireGuard: netns-tests/tests/kernel.rs runs it in a guest"]
fn kernel_device_is_made_taken_over_and_deleted() {
    in_namespaces(async || {
        let netlink = Netlink::connect().unwrap();
        let (mut links, mut devices) = kernel_agent(&netlink);
        assert!(links.reconcile(&kernel_wish()).await.unwrap().operations > 0);
        assert!(run("ip -d link show margay0").contains("wireguard"));
        let first = devices.reconcile(&kernel_wish()).await.unwrap();
        assert!(first.operations > 0 && first.errors.is_empty(), "{first:?}");
        let (mut links, mut devices) = kernel_agent(&netlink);
        for reconciler in [&mut links as &mut dyn mesh_agent::reconcile::Reconciler, &mut devices] {
            let second = reconciler.reconcile(&kernel_wish()).await.unwrap();
            assert!(second.operations == 0 && second.errors.is_empty(), "{second:?}");
        }
        assert!(run("wg show margay0 dump").lines().count() == 4);
        // To userspace: the link goes, and mesh-datapath is asked for.
        let userspace = Desired { datapath: desired::Datapath::Userspace, ..kernel_wish() };
        let report = links.reconcile(&userspace).await.unwrap();
        assert!(report.errors[0].to_string().contains("is mesh-datapath@margay0 running?"), "{report:?}");
        assert!(!common::succeeds("ip link show margay0"));
        // And back, in the place of a TUN.
        run("ip tuntap add margay0 mode tun");
        let report = links.reconcile(&kernel_wish()).await.unwrap();
        assert!(report.errors.is_empty(), "{report:?}");
        assert!(run("ip -d link show margay0").contains("wireguard"));
        // The clean-up takes it away, and nothing of another name.
        run("ip link add wg0 type wireguard");
        let nothing = Desired { prune: true, ..Desired::default() };
        let report = LeftoverReconciler::new(netlink).reconcile(&nothing).await.unwrap();
        assert!(report.operations == 1 && report.errors.is_empty(), "{report:?}");
        assert!(!common::succeeds("ip link show margay0") && common::succeeds("ip link show wg0"));
        // What is neither is not ours to delete.
        run("ip link add margay0 type veth peer name other");
        let report = links.reconcile(&kernel_wish()).await.unwrap();
        assert!(report.errors[0].to_string().contains("not of our making"), "{report:?}");
    });
}

/// A thousand peers, and one with thousands of prefixes, in several messages each way.
#[test]
#[ignore = "needs kernel WireGuard: netns-tests/tests/kernel.rs runs it in a guest"]
fn kernel_device_holds_more_than_a_message_does() {
    in_namespaces(async || {
        run("ip link add margay0 type wireguard");
        let device = Kernel::new().open("margay0");
        let many = |peer: u16, count: u16| -> BTreeSet<IpNet> {
            (0..count).map(|n| format!("fd00:{peer:x}:{n:x}::/48").parse().unwrap()).collect()
        };
        let peer = |n: u16| {
            let mut bytes = [0x11; 32];
            bytes[..2].copy_from_slice(&n.to_be_bytes());
            PublicKey::from_bytes(bytes)
        };
        let count = |n: u16| if n == 500 { 4000 } else { 3 };
        let ops = (0..1000u16)
            .map(|n| {
                let update = PeerUpdate { add_allowed_ips: many(n, count(n)), ..PeerUpdate::default() };
                Op::SetPeer(peer(n), update)
            })
            .collect();
        device.apply(ops).await.unwrap();
        let read = device.read().await.unwrap();
        assert_eq!(read.peers.len(), 1000);
        for n in 0..1000 {
            assert_eq!(read.peers[&peer(n)].allowed_ips, many(n, count(n)), "peer {n}");
        }
        let removal = PeerUpdate { remove_allowed_ips: many(500, 3999), ..PeerUpdate::default() };
        device.apply(vec![Op::SetPeer(peer(500), removal)]).await.unwrap();
        let read = device.read().await.unwrap();
        assert_eq!(read.peers[&peer(500)].allowed_ips, &many(500, 4000) - &many(500, 3999));
        assert_eq!(read.peers.len(), 1000, "nobody is left over");
    });
}

/// A prefix of another peer is not taken away with it, nor a peer that went before.
#[test]
#[ignore = "needs kernel WireGuard: netns-tests/tests/kernel.rs runs it in a guest"]
fn kernel_device_removes_only_what_the_peer_has() {
    in_namespaces(async || {
        run("ip link add margay0 type wireguard");
        let device = Kernel::new().open("margay0");
        let removal = |prefixes: &[&str]| PeerUpdate {
            remove_allowed_ips: nets(prefixes),
            update_only: true,
            ..PeerUpdate::default()
        };
        device
            .apply(vec![
                Op::SetPeer(key(1), add(&["10.1.0.0/24", "10.8.0.0/24"])),
                Op::SetPeer(key(2), add(&["10.2.0.0/24"])),
                Op::SetPeer(key(1), removal(&["10.2.0.0/24", "10.8.0.0/24", "10.7.0.0/24"])),
                Op::SetPeer(key(3), removal(&["10.1.0.0/24"])),
                // Twice, the second time knowing how.
                Op::SetPeer(key(1), removal(&["10.2.0.0/24"])),
            ])
            .await
            .unwrap();
        let read = device.read().await.unwrap();
        assert_eq!(read.peers[&key(1)].allowed_ips, nets(&["10.1.0.0/24"]));
        assert_eq!(read.peers[&key(2)].allowed_ips, nets(&["10.2.0.0/24"]));
        assert_eq!(read.peers.len(), 2);
    });
}

/// While a prefix moves to and fro, and others come and go beside it, it always has an owner.
#[test]
#[ignore = "needs kernel WireGuard: netns-tests/tests/kernel.rs runs it in a guest"]
fn kernel_device_never_leaves_a_moving_prefix_unowned() {
    in_namespaces(async || {
        run("ip link add margay0 type wireguard");
        let device = Kernel::new().open("margay0");
        let start = vec![
            Op::SetPeer(key(1), add(&["10.9.0.0/24", "10.1.0.0/24"])),
            Op::SetPeer(key(2), add(&["10.2.0.0/24"])),
        ];
        device.apply(start).await.unwrap();
        // Another socket, as another process would look.
        let looker = Kernel::new().open("margay0");
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let until = done.clone();
        let looks = tokio::spawn(async move {
            let (mut looks, moving) = (0, nets(&["10.9.0.0/24"]));
            while !until.load(std::sync::atomic::Ordering::SeqCst) {
                let seen = looker.read().await.unwrap();
                let owners = seen.peers.values().filter(|peer| peer.allowed_ips.is_superset(&moving)).count();
                assert_eq!(owners, 1, "{seen:?}");
                assert_eq!(seen.peers.len(), 2, "{seen:?}");
                looks += 1;
            }
            looks
        });
        for round in 0..300 {
            let (to, from) = if round % 2 == 0 { (2, 1) } else { (1, 2) };
            let removal = PeerUpdate { remove_allowed_ips: nets(&["10.5.0.0/24"]), ..PeerUpdate::default() };
            let moves = vec![
                Op::SetPeer(key(to), add(&["10.9.0.0/24"])),
                Op::SetPeer(key(from), add(&["10.5.0.0/24"])),
                Op::SetPeer(key(from), removal),
            ];
            device.apply(moves).await.unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::SeqCst);
        assert!(looks.await.unwrap() > 20);
    });
}
