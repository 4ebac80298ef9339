//! The CNI server against a real kernel: pods as network namespaces, real BPF programs, the real policy
//! and kernel reconcilers; each test in namespaces of its own.
//!
//! ```text
//!   node (the test's namespace)                pod (a namespace, held open by a descriptor)
//!   mgy… ee:ee:ee:ee:ee:ee  ── veth ──  eth0 10.1.1.2/32 fd00:1::2/128, default via 169.254.1.1, fe80::1
//! ```
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{BufRead as _, BufReader, IoSlice, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{in_namespaces, run, succeeds};
use mesh_agent::cni::{self, Gate, Server};
use mesh_agent::ipam::{Key, host_interface};
use mesh_agent::plan::plan;
use mesh_agent::reconcile::links::LinkReconciler;
use mesh_agent::reconcile::neighbours::NeighbourReconciler;
use mesh_agent::reconcile::netlink::Netlink;
use mesh_agent::reconcile::policy::events::{self, DenyLog};
use mesh_agent::reconcile::policy::{Engine, PolicyReconciler};
use mesh_agent::reconcile::routes::RouteReconciler;
use mesh_agent::reconcile::rules::RuleReconciler;
use mesh_agent::reconcile::{ReconcileError, Reconciler, Report};
use mesh_agent::snapshot::{Cluster, MeshSpec, Node, ObjectRef, Pod};
use mesh_agent::status::Board;
use mesh_agent::store::Store;
use mesh_api::cni::{Attachment, Command, Reply, Request};
use mesh_api::status::DenyEvent;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio_util::sync::CancellationToken;

/// For a generation to be enforced: nothing here takes so long, unless it never comes to its end.
const PATIENCE: Duration = Duration::from_secs(5);

/// A gate whose answers the test sets.
#[derive(Default)]
struct FakeGate {
    attached: Mutex<Vec<String>>,
    refusal: Mutex<Option<String>>,
}

impl Gate for FakeGate {
    fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    fn attach_closed(&self, interface: &str) -> Result<(), String> {
        let link = run(&format!("ip -o link show {interface}"));
        assert!(link.contains("state DOWN") && !link.contains(",UP"), "up before policy: {link}");
        self.attached.lock().unwrap().push(interface.to_owned());
        self.refusal.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    fn forget(&self, _: &str) -> Result<(), String> {
        Ok(())
    }
}

/// A namespace with nothing in it; it goes when the descriptor does.
fn pod_namespace() -> OwnedFd {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap())
    });
    made.join().unwrap()
}

/// Runs a command in a namespace and gives what it said.
fn inside(netns: &OwnedFd, command: &str) -> String {
    let (netns, command) = (netns.try_clone().unwrap(), command.to_owned());
    let thread = std::thread::spawn(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
        run(&command)
    });
    thread.join().unwrap()
}

fn gets_through(netns: &OwnedFd, command: &str) -> bool {
    let (netns, command) = (netns.try_clone().unwrap(), command.to_owned());
    let thread = std::thread::spawn(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
        succeeds(&command)
    });
    thread.join().unwrap()
}

fn request(command: Command, container: &str, pod: &str) -> Request {
    Request {
        command,
        container_id: container.into(),
        ifname: "eth0".into(),
        netns: format!("/run/netns/{container}"),
        network: "margay".into(),
        pod_namespace: "default".into(),
        pod_name: pod.into(),
        pod_uid: String::new(),
        ips: Vec::new(),
        valid_attachments: Vec::new(),
    }
}

fn interface(container: &str) -> String {
    host_interface(&Key { container_id: container.into(), ifname: "eth0".into() })
}

fn exists(interface: &str) -> bool {
    succeeds(&format!("ip link show {interface}"))
}

/// What the objects say, `pods` by name and addresses.
fn cluster(pods: &[(&str, &[&str])]) -> Cluster {
    let node = Node {
        pod_cidrs: vec!["10.1.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        ..Node::default()
    };
    let pods = pods.iter().map(|(name, ips)| {
        let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let (namespace, name) = ("default".to_owned(), (*name).to_owned());
        let pod = Pod { namespace, name: name.clone(), node: Some("a".into()), ips, ..Pod::default() };
        (ObjectRef { namespace: "default".into(), name }, pod.into())
    });
    let pools = vec!["10.1.0.0/16".parse().unwrap(), "fd00:1::/32".parse().unwrap()];
    Cluster {
        mesh: MeshSpec { pools, ..MeshSpec::default() },
        nodes: [("a".to_owned(), node.into())].into(),
        namespaces: [("default".to_owned(), Default::default())].into(),
        pods: pods.collect(),
        ..Cluster::default()
    }
}

/// A node's agent as far as pods need one.
struct World {
    directory: tempfile::TempDir,
    store: Store,
    server: Arc<Server>,
    cancel: CancellationToken,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl World {
    async fn new(gate: Arc<dyn Gate>, reconcilers: Vec<Box<dyn Reconciler>>, board: Board) -> Self {
        Self::with(tempfile::tempdir().unwrap(), gate, reconcilers, board).await
    }

    async fn with(
        directory: tempfile::TempDir,
        gate: Arc<dyn Gate>,
        reconcilers: Vec<Box<dyn Reconciler>>,
        board: Board,
    ) -> Self {
        let store = Store::new(&["directory", cni::SOURCE]);
        store.update_local(|local| {
            local.node_name = "a".into();
            // A node without a key counts as one that does not know everything yet.
            local.rotation.slots = vec![keyservice::rotation::Slot {
                epoch: 0,
                public_key: keyservice::PublicKey::from_bytes([9; 32]),
                announced: true,
                preshared: false,
            }];
        });
        store.set_cluster("directory", cluster(&[]), 0);
        let netlink = Netlink::connect().unwrap();
        let server =
            Server::open_within(directory.path(), store.clone(), board.clone(), gate, netlink, PATIENCE)
                .await;
        let cancel = CancellationToken::new();
        let listener = cni::serve::bind(&directory.path().join("cni.sock"), 0o600).unwrap();
        let serving = tokio::spawn(cni::serve::serve(Arc::clone(&server), listener, cancel.clone()));
        let running = tokio::spawn(reconcile(store.clone(), board.clone(), reconcilers, cancel.clone()));
        Self { directory, store, server, cancel, tasks: vec![serving, running] }
    }

    /// Ends the agent; what it made stays.
    async fn stop(self) -> tempfile::TempDir {
        self.cancel.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
        drop(self.server);
        self.directory
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("cni.sock")
    }

    async fn ask(&self, request: Request, netns: Option<&OwnedFd>) -> Reply {
        let (socket, netns) = (self.socket(), netns.map(|netns| netns.try_clone().unwrap()));
        tokio::task::spawn_blocking(move || {
            let mut line = serde_json::to_vec(&request).unwrap();
            line.push(b'\n');
            serde_json::from_str(&send(&socket, &line, netns.as_ref())).unwrap()
        })
        .await
        .unwrap()
    }

    async fn add(&self, container: &str, pod: &str, netns: &OwnedFd) -> Attachment {
        match self.ask(request(Command::Add, container, pod), Some(netns)).await {
            Reply::Done { result: Some(attachment) } => attachment,
            other => panic!("{other:?}"),
        }
    }

    async fn del(&self, container: &str) {
        let reply = self.ask(request(Command::Del, container, "p"), None).await;
        assert_eq!(reply, Reply::Done { result: None });
    }
}

/// The runner's essence: every plan through every reconciler.
async fn reconcile(
    store: Store,
    board: Board,
    mut reconcilers: Vec<Box<dyn Reconciler>>,
    cancel: CancellationToken,
) {
    let mut snapshots = store.watch();
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let planned = plan(&snapshot);
        let desired = Arc::new(planned.desired);
        board.planned(Arc::clone(&snapshot), Arc::clone(&desired), planned.issues);
        for reconciler in &mut reconcilers {
            let outcome = reconciler.reconcile(&desired).await;
            board.passed(reconciler.name(), snapshot.generation, &outcome);
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = snapshots.changed() => {}
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
    }
}

/// A line each way, with the descriptor.
fn send(socket: &Path, line: &[u8], netns: Option<&OwnedFd>) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let descriptors: Vec<_> = netns.iter().map(|netns| netns.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let control: &[_] = if netns.is_some() { &rights } else { &[] };
    let sent =
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(line)], control, MsgFlags::empty(), None).unwrap();
    let _ = stream.write_all(&line[sent..]);
    let mut answer = String::new();
    let _ = BufReader::new(stream).read_line(&mut answer);
    answer
}

/// A policy reconciler that has nothing to do, for tests of other things.
struct NoPolicy;

impl Reconciler for NoPolicy {
    fn name(&self) -> &'static str {
        "policy"
    }

    fn stage(&self) -> mesh_agent::reconcile::Stage {
        mesh_agent::reconcile::Stage::Policy
    }

    fn reconcile<'a>(
        &'a mut self,
        _: &'a mesh_agent::desired::Desired,
    ) -> futures::future::BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async { Ok(Report::default()) })
    }
}

fn kernel() -> Vec<Box<dyn Reconciler>> {
    let netlink = Netlink::connect().unwrap();
    vec![
        Box::new(LinkReconciler::new(netlink.clone())),
        Box::new(NeighbourReconciler::new(netlink.clone())),
        Box::new(RouteReconciler::new(netlink.clone())),
        Box::new(RuleReconciler::new(netlink)),
    ]
}

async fn plain(gate: Arc<FakeGate>) -> World {
    let mut reconcilers: Vec<Box<dyn Reconciler>> = vec![Box::new(NoPolicy)];
    reconcilers.extend(kernel());
    let board = Board::new(&["policy", "links", "neighbours", "routes", "rules"]);
    World::new(gate, reconcilers, board).await
}

#[test]
fn a_pod_gets_addresses_routes_and_neighbours_and_leaves_nothing_behind() {
    in_namespaces(|| async {
        let gate = Arc::new(FakeGate::default());
        let world = plain(Arc::clone(&gate)).await;
        let pod = pod_namespace();
        let attachment = world.add("c1", "web", &pod).await;
        let addresses: Vec<String> = attachment.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.1.1.2/32", "fd00:1::2/128"]);
        assert_eq!(attachment.host_interface, interface("c1"));
        assert_eq!(attachment.mtu, 1420);
        assert_eq!(*gate.attached.lock().unwrap(), [interface("c1")]);

        let v4 = inside(&pod, "ip -4 route");
        assert!(v4.contains("default via 169.254.1.1 dev eth0") && v4.contains("onlink"), "{v4}");
        let v6 = inside(&pod, "ip -6 route");
        assert!(v6.contains("default via fe80::1 dev eth0") && v6.contains("onlink"), "{v6}");
        let link = inside(&pod, "ip -d link show eth0");
        assert!(link.contains("mtu 1420") && link.contains(&attachment.pod_mac), "{link}");
        let neighbours = inside(&pod, "ip neigh show nud permanent");
        assert_eq!(neighbours.matches("ee:ee:ee:ee:ee:ee").count(), 2, "{neighbours}");
        let addresses = inside(&pod, "ip -6 -o addr show dev eth0 scope global");
        assert!(addresses.contains("fd00:1::2/128") && !addresses.contains("tentative"), "{addresses}");
        assert!(inside(&pod, "ip -o link show lo").contains(",UP"));

        // Real packets: the node reaches its pod over the routes of that generation, at once.
        run("ip addr add 192.0.2.1/32 dev lo");
        run("ip addr add 2001:db8::1/128 dev lo nodad");
        assert!(succeeds("ping -c 1 -W 2 -I 192.0.2.1 10.1.1.2"), "{}", run("ip route show table 4207"));
        assert!(
            succeeds("ping -c 1 -W 2 -I 2001:db8::1 fd00:1::2"),
            "{}",
            run("ip -6 route show table 4207")
        );

        let same = world.add("c1", "web", &pod).await;
        assert_eq!(same, attachment, "the same ADD again");
        let check = world.ask(request(Command::Check, "c1", "web"), Some(&pod)).await;
        assert_eq!(check, Reply::Done { result: Some(attachment) });

        world.del("c1").await;
        world.del("c1").await;
        assert!(!exists(&interface("c1")));
        assert!(world.store.current().endpoints.is_empty());
        let check = world.ask(request(Command::Check, "c1", "web"), Some(&pod)).await;
        assert!(matches!(check, Reply::Failed { code: 3, .. }), "{check:?}");
        assert_eq!(world.server.usage().await, Some((0, None)));
        world.stop().await;
    });
}

#[test]
fn check_finds_what_was_changed_behind_its_back() {
    in_namespaces(|| async {
        let world = plain(Arc::default()).await;
        let pod = pod_namespace();
        world.add("c1", "web", &pod).await;
        let check = async || match world.ask(request(Command::Check, "c1", "web"), Some(&pod)).await {
            Reply::Failed { code: 101, message, .. } => message,
            other => panic!("{other:?}"),
        };
        inside(&pod, "ip route del default");
        assert_eq!(check().await, "eth0 in the pod: lacks the default route via 169.254.1.1");
        inside(&pod, "ip addr del 10.1.1.2/32 dev eth0");
        assert_eq!(check().await, "eth0 in the pod: lacks the address 10.1.1.2");
        inside(&pod, "ip link set eth0 down");
        assert_eq!(check().await, "eth0 in the pod: is down");
        run(&format!("ip link del {}", interface("c1")));
        assert_eq!(check().await, format!("link {}: is gone", interface("c1")));
        let anew = world.add("c1", "web", &pod).await;
        assert_eq!(anew.addresses[0], "10.1.1.3/32".parse().unwrap(), "a freed address is reused last");
        world.stop().await;
    });
}

#[test]
fn a_failed_add_is_undone_and_its_address_is_free_again() {
    in_namespaces(|| async {
        let gate = Arc::new(FakeGate::default());
        let world = plain(Arc::clone(&gate)).await;
        let pod = pod_namespace();
        *gate.refusal.lock().unwrap() = Some("the verifier says no".into());
        let reply = world.ask(request(Command::Add, "c1", "web"), Some(&pod)).await;
        let Reply::Failed { code: 5, message, .. } = reply else { panic!("{reply:?}") };
        assert!(message.contains("the verifier says no"), "{message}");
        assert!(!exists(&interface("c1")));
        assert_eq!(world.server.usage().await, Some((0, None)));

        *gate.refusal.lock().unwrap() = None;
        // The name is taken in the pod.
        inside(&pod, "ip link add eth0 type veth peer name other");
        let reply = world.ask(request(Command::Add, "c1", "web"), Some(&pod)).await;
        let Reply::Failed { code: 5, message, .. } = reply else { panic!("{reply:?}") };
        assert!(message.contains("exists already"), "{message}");
        inside(&pod, "ip link del eth0");
        let attachment = world.add("c1", "web", &pod).await;
        assert_eq!(attachment.addresses.len(), 2);
        let reply = world.ask(request(Command::Add, "c1", "other"), Some(&pod)).await;
        assert!(
            matches!(reply, Reply::Failed { code: 100, .. }),
            "another pod in the same container: {reply:?}"
        );
        assert!(exists(&interface("c1")), "the first one stays");
        world.stop().await;
    });
}

#[test]
fn an_exact_address_is_given_or_refused_with_the_reason() {
    in_namespaces(|| async {
        let world = plain(Arc::default()).await;
        let (one, two) = (pod_namespace(), pod_namespace());
        let exact = |container, ip: &str| Request {
            ips: vec![ip.parse().unwrap()],
            ..request(Command::Add, container, container)
        };
        let reply = world.ask(exact("c1", "10.1.99.7"), Some(&one)).await;
        let Reply::Done { result: Some(attachment) } = reply else { panic!("{reply:?}") };
        assert_eq!(attachment.addresses, ["10.1.99.7/32".parse().unwrap()]);
        assert!(inside(&one, "ip -6 -o addr show dev eth0").is_empty(), "no IPv6 for an IPv4 pod");
        for (ip, code, why) in [
            ("10.1.99.7", 11, "in use by pod default/c1"),
            ("10.1.1.1", 7, "reserved"),
            ("172.16.0.1", 7, "in no pool"),
        ] {
            let reply = world.ask(exact("c2", ip), Some(&two)).await;
            let Reply::Failed { code: got, message, .. } = reply else { panic!("{reply:?}") };
            assert!(got == code && message.contains(why), "{ip}: {got} {message}");
        }
        world.stop().await;
    });
}

#[test]
fn pods_outlive_the_agent_and_what_died_meanwhile_is_released() {
    in_namespaces(|| async {
        let world = plain(Arc::default()).await;
        let (stays, dies) = (pod_namespace(), pod_namespace());
        let first = world.add("c1", "stays", &stays).await;
        world.add("c2", "dies", &dies).await;
        let directory = world.stop().await;
        run(&format!("ip link del {}", interface("c2")));

        let mut reconcilers: Vec<Box<dyn Reconciler>> = vec![Box::new(NoPolicy)];
        reconcilers.extend(kernel());
        let board = Board::new(&["policy", "links", "neighbours", "routes", "rules"]);
        let world = World::with(directory, Arc::<FakeGate>::default(), reconcilers, board).await;
        let endpoints = world.store.current().endpoints.clone();
        assert_eq!(endpoints.keys().collect::<Vec<_>>(), [&first.host_interface]);
        assert_ne!(endpoints[&first.host_interface].ifindex, 0);
        assert_eq!(world.add("c1", "stays", &stays).await, first);
        world.stop().await;
    });
}

#[test]
fn gc_takes_away_what_the_runtime_does_not_know() {
    in_namespaces(|| async {
        let world = plain(Arc::default()).await;
        let pods: Vec<OwnedFd> = (0..3).map(|_| pod_namespace()).collect();
        for (number, pod) in pods.iter().enumerate() {
            world.add(&format!("c{number}"), "web", pod).await;
        }
        run("ip link add mgy0123456789 type veth peer name stray");
        let gc =
            Request { valid_attachments: vec![("c1".into(), "eth0".into())], ..request(Command::Gc, "", "") };
        assert_eq!(world.ask(gc, None).await, Reply::Done { result: None });
        let left: Vec<bool> = (0..3).map(|number| exists(&interface(&format!("c{number}")))).collect();
        assert_eq!(left, [false, true, false]);
        assert!(!exists("mgy0123456789"));
        let other = Request { network: "other".into(), ..request(Command::Gc, "", "") };
        assert_eq!(world.ask(other, None).await, Reply::Done { result: None });
        assert!(exists(&interface("c1")), "another network's GC");
        world.stop().await;
    });
}

#[test]
fn add_waits_for_enforcement_and_is_undone_without_it() {
    in_namespaces(|| async {
        // A policy reconciler that never comes to its end.
        let board = Board::new(&["policy"]);
        let world = World::new(Arc::<FakeGate>::default(), Vec::new(), board).await;
        let pod = pod_namespace();
        let request = request(Command::Add, "c1", "web");
        let waiting = world.ask(request, Some(&pod));
        let reply = tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap();
        let Reply::Failed { code: 11, message, .. } = reply else { panic!("{reply:?}") };
        assert!(message.contains("is not enforced") && message.contains("policy: pending"), "{message}");
        assert!(!exists(&interface("c1")));
        assert!(world.store.current().endpoints.is_empty());
        world.stop().await;
    });
}

#[test]
fn garbage_on_the_socket_is_refused_and_the_next_request_served() {
    in_namespaces(|| async {
        let world = plain(Arc::default()).await;
        let socket = world.socket();
        let pod = pod_namespace();
        let (same, netns) = (socket.clone(), pod.try_clone().unwrap());
        tokio::task::spawn_blocking(move || {
            let long = vec![b'{'; 2 << 20];
            for bytes in [
                b"\n".as_slice(),
                b"{}\n",
                b"\xff\xfe\n",
                b"[1]\n",
                b"{\"command\":\"ADD\",\"x\":1}\n",
                &long,
            ] {
                let answer = send(&same, bytes, Some(&netns));
                // The long one may be cut off before its answer.
                assert!(answer.contains("\"code\":6") || bytes.len() > 1 << 20, "{answer}");
            }
        })
        .await
        .unwrap();
        for (change, code) in [
            (Request { ifname: "../eth0".into(), ..request(Command::Add, "c1", "web") }, 4),
            (Request { ifname: "a-very-long-interface".into(), ..request(Command::Add, "c1", "web") }, 4),
            (Request { container_id: "../../x".into(), ..request(Command::Add, "c1", "web") }, 4),
            (Request { container_id: String::new(), ..request(Command::Del, "c1", "web") }, 4),
            (Request { pod_name: String::new(), ..request(Command::Add, "c1", "web") }, 4),
        ] {
            let reply = world.ask(change.clone(), Some(&pod)).await;
            assert!(matches!(reply, Reply::Failed { code: got, .. } if got == code), "{change:?}: {reply:?}");
        }
        let reply = world.ask(request(Command::Add, "c1", "web"), None).await;
        assert!(matches!(reply, Reply::Failed { code: 4, .. }), "no namespace: {reply:?}");
        world.add("c1", "web", &pod).await;
        assert_eq!(world.ask(request(Command::Status, "", ""), None).await, Reply::Done { result: None });
        world.stop().await;
    });
}

#[test]
fn a_pod_starts_closed_and_opens_when_its_object_arrives() {
    in_namespaces(|| async {
        let directory = tempfile::tempdir().unwrap();
        run(&format!("mount -t bpf bpf {}", directory.path().display()));
        let engine = Engine::open(&directory.path().join("margay"));
        assert_eq!(engine.ready(), Ok(()));
        let board = Board::new(&["policy", "links", "neighbours", "routes", "rules"]);
        let mut reconcilers: Vec<Box<dyn Reconciler>> = vec![Box::new(PolicyReconciler::new(
            Arc::clone(&engine),
            board.clone(),
            Netlink::connect().unwrap(),
        ))];
        reconcilers.extend(kernel());
        let denied = DenyLog::default();
        let ended = CancellationToken::new();
        let telling = tokio::spawn(events::follow(Arc::clone(&engine), denied.clone(), ended.clone()));
        let world = World::new(Arc::clone(&engine) as Arc<dyn Gate>, reconcilers, board.clone()).await;
        run("sysctl -qw net.ipv4.ip_forward=1");
        let (web, db) = (pod_namespace(), pod_namespace());
        world.add("c1", "web", &web).await;
        world.add("c2", "db", &db).await;
        assert_eq!(board.observed().endpoint_policy[&interface("c1")], "closed");
        let ping = "ping -c 1 -W 1 10.1.1.3";
        assert!(!gets_through(&web, ping), "no object, no packet");
        let told = |event: &DenyEvent| {
            let ends = (event.src.to_string(), event.dst.to_string());
            ends == ("10.1.1.2".to_owned(), "10.1.1.3".to_owned()) && event.reason == "Closed"
        };
        common::eventually("the denied ping is told", async || denied.list().iter().any(told)).await;
        let counters = engine.counters().unwrap();
        assert!(
            counters.iter().any(|of| !of.allowed && of.reason == "closed" && of.packets > 0),
            "{counters:?}"
        );

        let pods: [(&str, &[&str]); 2] =
            [("web", &["10.1.1.2", "fd00:1::2"]), ("db", &["10.1.1.3", "fd00:1::3"])];
        let generation = world.store.set_cluster("directory", cluster(&pods), 2);
        common::eventually("policy is live", async || board.observed().generation().policy >= generation)
            .await;
        assert_eq!(board.observed().endpoint_policy[&interface("c1")], "open");
        assert!(gets_through(&web, ping));
        world.del("c1").await;
        world.del("c2").await;
        world.stop().await;
        ended.cancel();
        telling.await.unwrap();
        drop(engine);
        Engine::cleanup(&directory.path().join("margay")).unwrap();
        run(&format!("umount {}", directory.path().display()));
    });
}
