//! WireGuard in the kernel, for real: a virtual machine with Debian's kernel is one more node of a lab, beside mesh-datapath
//! and wireguard-go. One boot serves all tests, one after the other.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::{bins, parse_ping};
use netns_tests::capture::Capture;
use netns_tests::guest::{self, Guest, image};
use netns_tests::lab::Lab;
use netns_tests::manifests::{self, PodStatus};
use netns_tests::netns::Netns;
use netns_tests::probe::{self, Outcome, Probe};
use netns_tests::spec::{self, Protocol};
use netns_tests::wait;

const CANARY: &[u8] = b"margay-probe";
/// A guest is an emulated machine on a machine with other things to do.
const SLOW: Duration = Duration::from_secs(60);

const LAB: &str = "
name: kernels
nodes:
  - {name: a, ips: [192.0.2.1, '2001:db8::1'], podCIDRs: [10.244.1.0/24, 'fd00:10:244:1::/64']}
  - {name: g, ips: [192.0.2.2, '2001:db8::2'], podCIDRs: [10.244.2.0/24, 'fd00:10:244:2::/64'], datapath: wireguard-go}
  - {name: k, ips: [192.0.2.3, '2001:db8::3'], podCIDRs: [10.244.3.0/24, 'fd00:10:244:3::/64'], datapath: guest}
pods:
  - {namespace: d, name: pa, node: a, ports: [{port: 8080}, {port: 8080, protocol: UDP}]}
  - {namespace: d, name: pg, node: g, ports: [{port: 8080}, {port: 8080, protocol: UDP}]}
";

/// Everything the tests share. Declared in the order in which it ends.
struct World {
    capture: Capture,
    guest: Guest,
    lab: Lab,
    /// Addresses of the guest's pod `pk`, once the mesh is up.
    pod: Vec<IpAddr>,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);

/// The path of the newest test program of that name that was built beside ours.
fn test_program(name: &str) -> PathBuf {
    let deps = bins().dir.join("deps");
    let entries = std::fs::read_dir(&deps).unwrap().flatten().filter(|entry| {
        let file = entry.file_name().to_string_lossy().into_owned();
        file.strip_prefix(name).is_some_and(|rest| rest.starts_with('-') && !rest.contains('.'))
    });
    let newest = entries.max_by_key(|entry| entry.metadata().unwrap().modified().unwrap());
    newest.unwrap_or_else(|| panic!("no {name} in {}: build the workspace's tests", deps.display())).path()
}

/// Runs a test in the world, which is made for the first one; `meshed` brings the mesh up in it.
fn in_world(meshed: bool, test: impl FnOnce(&mut World)) {
    if guest::skipped() {
        return;
    }
    let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    let world = world.get_or_insert_with(boot);
    if meshed && world.pod.is_empty() {
        bring_up(world);
    }
    test(world);
}

fn boot() -> World {
    let bins = bins();
    let conformance = test_program("datapath_conformance");
    let initramfs = image::initramfs(&bins, &[&conformance]).unwrap();
    let lab = Lab::plug(spec::Lab::parse(LAB).unwrap(), &bins).unwrap();
    let capture = Capture::start(lab.wire().netns(), &[51820], &[CANARY]).unwrap();
    let start = Instant::now();
    let guest = Guest::boot(lab.host("k").unwrap(), &initramfs).unwrap();
    let name = conformance.file_name().unwrap().to_string_lossy().into_owned();
    guest.run(&["ln", "-s", &format!("/usr/bin/{name}"), "/usr/bin/datapath_conformance"]).unwrap();
    println!("the guest is up after {:?}: {}", start.elapsed(), guest.read("/proc/version").unwrap().trim());
    World { capture, guest, lab, pod: Vec::new() }
}

fn bring_up(world: &mut World) {
    let World { lab, guest, pod, .. } = world;
    lab.address().unwrap();
    lab.start_mesh().unwrap();
    guest.start_mesh(lab, "").unwrap();
    guest.settle(2, "kernel", SLOW).unwrap();
    lab.settle(SLOW).unwrap();
    let object =
        spec::Pod { namespace: "d".into(), name: "pk".into(), node: "k".into(), ..Default::default() };
    lab.put(manifests::pod(&object, &PodStatus::default())).unwrap();
    lab.start_pods().unwrap();
    let ips = guest.add_pod("d", "pk").unwrap();
    lab.put(manifests::pod(&object, &PodStatus { ips: ips.clone(), ..Default::default() })).unwrap();
    lab.enforced().unwrap();
    guest.run(&["mesh-lab", "here", "enforced"]).unwrap();
    let addresses: Vec<String> = ips.iter().map(ToString::to_string).collect();
    let listen =
        ["ip", "netns", "exec", "d_pk", "mesh-lab", "here", "listen", "--name", "d/pk", "--port", "8080"];
    let all: Vec<&str> = listen.into_iter().chain(addresses.iter().map(String::as_str)).collect();
    guest.start_unit("listen", &all).unwrap();
    *pod = ips;
}

fn of(ips: &[IpAddr], v6: bool) -> IpAddr {
    *ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap()
}

impl World {
    fn local(&self, pod: &str) -> (&Netns, &[IpAddr]) {
        let pod = self.lab.pod("d", pod).unwrap();
        (&pod.netns, &pod.ips)
    }

    /// Probes between the pods of all three nodes, those that begin in the guest apart.
    fn probes(&self) -> Vec<Probe> {
        let mut probes = Vec::new();
        for from in ["pa", "pg"] {
            let (netns, own) = self.local(from);
            for to in ["pa", "pg", "pk"].into_iter().filter(|to| *to != from) {
                let theirs = if to == "pk" { self.pod.as_slice() } else { self.local(to).1 };
                for v6 in [false, true] {
                    for protocol in [Protocol::Tcp, Protocol::Udp] {
                        probes.push(Probe {
                            from: netns.clone(),
                            src: of(own, v6),
                            dst: of(theirs, v6),
                            port: 8080,
                            protocol,
                            listener: format!("d/{to}"),
                        });
                    }
                }
            }
        }
        probes
    }

    fn assert_all_reach_all(&self) {
        let probes: Vec<(Probe, bool)> = self.probes().into_iter().map(|probe| (probe, true)).collect();
        for ((probe, _), outcome) in probes.iter().zip(probe::all(&probes).unwrap()) {
            assert_eq!(outcome, Outcome::Allowed, "{} -> {} {}", probe.src, probe.listener, probe.protocol);
        }
        for to in ["pa", "pg"] {
            for v6 in [false, true] {
                let (from, at) = (of(&self.pod, v6), SocketAddr::new(of(self.local(to).1, v6), 8080));
                for udp in [false, true] {
                    let (from, at, listener) = (from.to_string(), at.to_string(), format!("d/{to}"));
                    let mut probe = vec!["mesh-lab", "here", "probe", "--listener", &listener, &from, &at];
                    probe.extend(udp.then_some("--udp"));
                    self.guest.run_in("d_pk", &probe).unwrap();
                }
            }
        }
    }

    /// The wire shows the mesh's datagrams, and ICMP that quotes one to a port which nobody has at the moment.
    fn assert_nothing_in_clear(&self) {
        let seen = self.capture.seen();
        assert!(seen.canaries.is_empty(), "{seen:?}");
        assert!(seen.mesh > 100, "the capture has seen the mesh");
        for stranger in &seen.examples {
            let icmp = stranger.contains("IP protocol 1,") || stranger.contains("IP protocol 58,");
            assert!(icmp, "{stranger}");
        }
    }

    /// Restarts the guest's agent with another datapath, and waits until the mesh is as before.
    fn switch(&self, datapath: &str) -> Duration {
        let start = Instant::now();
        self.guest.configure(&format!("datapath: {datapath}")).unwrap();
        self.guest.kill_unit("mesh-agent").unwrap();
        self.guest.settle(2, datapath, SLOW).unwrap();
        start.elapsed()
    }
}

/// In the guest, since only there is a kernel to hold to it.
#[test]
fn the_conformance_suite_holds_for_the_kernels_device() {
    in_world(false, |world| {
        let suite = ["datapath_conformance", "--ignored", "--test-threads=1", "kernel_"];
        let text = world.guest.start(&suite).unwrap().end(SLOW * 2).unwrap();
        println!("{}", text.stdout);
        assert_eq!(text.code, 0, "{}{}", text.stdout, text.stderr);
        for test in [
            "kernel_device_conforms",
            "kernel_device_is_made_taken_over_and_deleted",
            "kernel_device_holds_more_than_a_message_does",
            "kernel_device_removes_only_what_the_peer_has",
            "kernel_device_never_leaves_a_moving_prefix_unowned",
        ] {
            assert!(text.stdout.contains(&format!("test {test} ... ok")), "{test}: {}", text.stdout);
        }
    });
}

#[test]
fn kernel_userspace_and_wireguard_go_are_one_mesh() {
    in_world(true, |world| {
        world.assert_all_reach_all();
        let guest = &world.guest;
        // Hosts too, to pods and to each other's.
        for v6 in [false, true] {
            for to in [of(world.local("pa").1, v6), of(world.local("pg").1, v6)] {
                guest.run(&["ping", "-c", "2", "-i", "0.2", "-W", "5", &to.to_string()]).unwrap();
            }
            let to = of(&world.pod, v6).to_string();
            for host in ["a", "g"] {
                let ping = ["ping", "-c", "2", "-i", "0.2", "-W", "5", &to];
                world.lab.host(host).unwrap().run(&ping).unwrap();
            }
        }
        // Three views of the same device.
        wait::until("status, wg and metrics to agree", SLOW, || {
            let status = guest.status()?;
            let device = status.devices.first().expect("a device");
            anyhow::ensure!(
                (device.kind.as_str(), device.core.as_str()) == ("kernel", "kernel"),
                "{device:?}"
            );
            let release = guest.read("/proc/sys/kernel/osrelease")?;
            anyhow::ensure!(device.version == release.trim(), "{device:?}");
            let dump = guest.run(&["wg", "show", "margay0", "dump"])?;
            let metrics = guest.run(&["mesh-lab", "here", "metrics"])?;
            let info = format!(
                "margay_datapath_info{{iface=\"margay0\",version=\"{}\",core=\"kernel\"",
                release.trim()
            );
            anyhow::ensure!(metrics.contains(&info), "{metrics}");
            for peer in &status.peers {
                let line = dump.lines().find(|line| line.starts_with(&peer.public_key)).expect("peer in wg");
                let fields: Vec<&str> = line.split('\t').collect();
                anyhow::ensure!(fields[2] == peer.endpoint.expect("endpoint").to_string(), "{line} {peer:?}");
                anyhow::ensure!(fields[4] != "0" && peer.handshake_age_seconds.is_some(), "{line} {peer:?}");
                let rcvd =
                    |text: &str, at: usize| text.split('\t').nth(at).and_then(|n| n.parse::<u64>().ok());
                anyhow::ensure!(rcvd(line, 5) >= Some(peer.rx_bytes) && peer.rx_bytes > 0, "{line} {peer:?}");
                let prefixes: Vec<String> = peer.allowed_ips.iter().map(ToString::to_string).collect();
                let mut known: Vec<&str> = fields[3].split(',').collect();
                anyhow::ensure!(known.len() == prefixes.len(), "{known:?} {prefixes:?}");
                known.retain(|prefix| !prefixes.iter().any(|own| own == prefix));
                anyhow::ensure!(known.is_empty(), "{known:?} {prefixes:?}");
                let metric = metrics.lines().find(|line| {
                    line.starts_with("wireguard_latest_handshake_seconds") && line.contains(&peer.public_key)
                });
                let value = metric.and_then(|line| line.rsplit(' ').next()).unwrap_or_default();
                anyhow::ensure!(value == fields[4], "{metric:?} {line}");
            }
            Ok(Some(()))
        })
        .unwrap();
        let status = world.lab.agent("a").unwrap().status().unwrap();
        assert_eq!((status.devices[0].kind.as_str(), status.peers.len()), ("userspace", 2));
        assert!(status.peers.iter().all(|peer| peer.rx_bytes > 0), "{:?}", status.peers);
        assert!(world.lab.host("g").unwrap().run(&["wg", "show"]).unwrap().contains("latest handshake"));
        world.assert_nothing_in_clear();
    });
}

#[test]
fn killing_the_agent_in_a_loop_loses_no_packet_of_a_kernel_device() {
    in_world(true, |world| {
        world.assert_all_reach_all();
        let (from, _) = world.local("pa");
        let target = of(&world.pod, false).to_string();
        let flood = from
            .command("ping")
            .args(["-n", "-q", "-i", "0.01", "-c", "1000", "-W", "10", &target])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let before = world.guest.unit("mesh-agent").unwrap().1;
        let device = || {
            let text = world.guest.run(&["ip", "-o", "link", "show", "margay0"]).unwrap();
            text.split(':').next().unwrap().to_owned()
        };
        let index = device();
        for kill in 1..=5 {
            world.guest.kill_unit("mesh-agent").unwrap();
            wait::until("the agent to be started again", SLOW, || {
                let (pid, restarts) = world.guest.unit("mesh-agent")?;
                Ok((pid.is_some() && restarts >= before + kill).then_some(()))
            })
            .unwrap();
        }
        world.guest.settle(2, "kernel", SLOW).unwrap();
        let output = flood.wait_with_output().unwrap();
        let (sent, received, _) = parse_ping(&String::from_utf8_lossy(&output.stdout)).unwrap();
        assert_eq!((sent, received), (1000, 1000));
        assert_eq!(device(), index, "the device outlives its agents");
    });
}

#[test]
fn a_switch_of_datapaths_and_back_breaks_no_connection_and_shows_nothing() {
    in_world(true, |world| {
        world.assert_all_reach_all();
        let at = SocketAddr::new(of(&world.pod, true), 7777);
        let text = at.to_string();
        let echo = ["ip", "netns", "exec", "d_pk", "mesh-lab", "here", "echo", &text];
        world.guest.start_unit("echo", &echo).unwrap();
        let (netns, _) = world.local("pa");
        let stream =
            wait::until("the echo", SLOW, || Ok(Some(netns.run(|| TcpStream::connect(at))??))).unwrap();
        let done = AtomicBool::new(false);
        let carried = std::thread::scope(|scope| {
            let carry = scope.spawn(|| carry(stream, &done));
            let switches = (|| {
                for datapath in ["userspace", "kernel", "userspace", "kernel"] {
                    let took = world.switch(datapath);
                    println!("to {datapath} in {took:?}");
                    let link = world.guest.run(&["ip", "-d", "link", "show", "margay0"]).unwrap();
                    let kind = if datapath == "kernel" { "wireguard" } else { "tun type tun" };
                    assert!(link.contains(kind), "{link}");
                    world.assert_all_reach_all();
                }
            })
            .call();
            done.store(true, Ordering::SeqCst);
            let carried = carry.join();
            if let Err(panic) = switches {
                std::panic::resume_unwind(panic);
            }
            carried.unwrap()
        });
        assert!(carried > 100_000, "{carried} bytes only");
        world.guest.stop_unit("echo").unwrap();
        world.assert_nothing_in_clear();
        let (pid, _) = world.guest.unit("mesh-datapath").unwrap();
        assert!(pid.is_some(), "mesh-datapath stands by");
    });
}

/// A closure whose panic is a value, so that those beside it can be told to end.
trait Call {
    fn call(self) -> std::thread::Result<()>;
}

impl<F: FnOnce()> Call for F {
    fn call(self) -> std::thread::Result<()> {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(self))
    }
}

/// Sends numbered lines through an echo until told to end, and checks each byte that comes back. Bytes carried.
fn carry(stream: TcpStream, done: &AtomicBool) -> u64 {
    stream.set_read_timeout(Some(SLOW)).unwrap();
    let mut back = stream.try_clone().unwrap();
    let mut forth = stream;
    let line =
        |n: u64| format!("{} {n:016x} {}\n", String::from_utf8_lossy(CANARY), "0123456789abcdef".repeat(8));
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut total = 0;
            for n in 0.. {
                let wanted = line(n);
                let mut got = vec![0; wanted.len()];
                match back.read_exact(&mut got) {
                    Ok(()) => assert_eq!(String::from_utf8_lossy(&got), wanted),
                    Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return (n, total),
                    Err(error) => panic!("the connection broke or stalled: {error}"),
                }
                total += got.len() as u64;
            }
            unreachable!()
        });
        let mut sent = 0;
        while !done.load(Ordering::SeqCst) {
            forth.write_all(line(sent).as_bytes()).unwrap();
            sent += 1;
            std::thread::sleep(Duration::from_millis(5)); // Paced: an emulated machine is slow.
        }
        forth.shutdown(std::net::Shutdown::Write).unwrap();
        let (received, total) = reader.join().unwrap();
        assert_eq!(received, sent, "lines that came back");
        total
    })
}
