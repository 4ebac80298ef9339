//! The reconcilers against a real kernel, each test in a network namespace of its own.
//!
//! ```text
//!   margay0 (TUN, nobody behind it)      mgy0123456789 ── pod0 (veth)      eth9 ── eth9p (veth, foreign)
//! ```
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::{in_namespaces, run, succeeds};
use mesh_agent::desired::{Desired, Link, Masquerade, Route, RouteTarget, Rule};
use mesh_agent::reconcile::addresses::AddressReconciler;
use mesh_agent::reconcile::links::LinkReconciler;
use mesh_agent::reconcile::masquerade::MasqueradeReconciler;
use mesh_agent::reconcile::neighbours::NeighbourReconciler;
use mesh_agent::reconcile::netlink::Netlink;
use mesh_agent::reconcile::routes::RouteReconciler;
use mesh_agent::reconcile::rules::RuleReconciler;
use mesh_agent::reconcile::sysctls::SysctlReconciler;
use mesh_agent::reconcile::{ReconcileError, Reconciler};

const VETH: &str = "mgy0123456789";

fn topology() {
    run("ip tuntap add margay0 mode tun");
    run(&format!("ip link add {VETH} type veth peer name pod0"));
    run(&format!("ip link set {VETH} up"));
    run("ip link set pod0 up");
    run("ip link add eth9 type veth peer name eth9p");
    run("ip link set eth9 up");
    run("ip link set eth9p up");
    run("ip addr add 192.0.2.1/24 dev eth9");
    run("ip addr add 2001:db8::1/64 dev eth9 nodad");
}

/// What bears no mark of ours, some of it in our own tables and priorities.
fn foreign_state() {
    run("ip route add 198.51.100.0/24 via 192.0.2.9");
    run("ip route add 203.0.113.0/24 dev eth9 table 4207");
    run("ip rule add priority 30005 from 203.0.113.7 lookup 99");
    run("ip rule add priority 100 from 203.0.113.8 lookup 4207");
    run("ip neigh add 192.0.2.77 lladdr 02:00:00:00:00:77 dev eth9 nud permanent");
    run("nft add table inet other");
    run("nft add chain inet other post { type nat hook postrouting priority 100 ; }");
}

/// All of the namespace's state that anybody could compare.
fn everything() -> String {
    let mut all: Vec<String> = [
        "ip -o link",
        "ip -o addr show scope global",
        "ip -4 route show table all",
        "ip -6 route show table all proto static",
        "ip -6 route show table all proto boot",
        "ip -4 rule",
        "ip -6 rule",
        "ip neigh show nud permanent",
        "nft list ruleset",
    ]
    .map(run)
    .to_vec();
    for sysctl in ["ipv4/ip_forward", "ipv4/conf/all/rp_filter", "ipv6/conf/all/forwarding"] {
        all.push(std::fs::read_to_string(Path::new("/proc/sys/net").join(sysctl)).unwrap());
    }
    // Whether a carrier is there is told a moment after the fact, and is none of ours.
    let told_late = ["NO-CARRIER,", ",LOWER_UP", " linkdown", "state UP", "state DOWN", "state UNKNOWN"];
    told_late.iter().fold(all.join("\n"), |text, word| text.replace(word, ""))
}

fn route(dst: &str, dev: &str, src: Option<&str>) -> Route {
    let src = src.map(|src| src.parse().unwrap());
    let target = RouteTarget::Device { name: dev.into(), src };
    Route { table: 4207, dst: dst.parse().unwrap(), target, metric: 0 }
}

fn unreachable(dst: &str) -> Route {
    Route { table: 4207, dst: dst.parse().unwrap(), target: RouteTarget::Unreachable, metric: u32::MAX }
}

fn desired() -> Desired {
    let rule = |priority, ipv6, from: Option<&str>, table| Rule {
        priority,
        ipv6,
        from: from.map(|from| from.parse().unwrap()),
        table,
    };
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let mut node = route("192.0.2.2/32", "margay0", None);
    node.table = 4208;
    Desired {
        prune: true,
        links: [
            ("margay0".into(), Link { mtu: 1420, up: true }),
            (VETH.into(), Link { mtu: 1420, up: true }),
        ]
        .into(),
        addresses: [("margay0".into(), nets(&["10.244.1.1/32", "fd00:244:1::1/128"]))].into(),
        neighbours: [
            ((VETH.into(), "10.244.1.2".parse().unwrap()), [2, 0, 0, 0, 0, 2]),
            ((VETH.into(), "fd00:244:1::2".parse().unwrap()), [2, 0, 0, 0, 0, 2]),
        ]
        .into(),
        routes: BTreeSet::from([
            unreachable("10.244.0.0/16"),
            unreachable("fd00:244::/32"),
            route("10.244.2.0/24", "margay0", Some("192.0.2.1")),
            route("fd00:244:2::/48", "margay0", Some("2001:db8::1")),
            route("10.244.1.2/32", VETH, None),
            route("fd00:244:1::2/128", VETH, None),
            node,
        ]),
        rules: BTreeSet::from([
            rule(30000, false, None, 4207),
            rule(30000, true, None, 4207),
            rule(30001, false, Some("10.244.0.0/16"), 4208),
            rule(30001, true, Some("fd00:244::/32"), 4208),
        ]),
        sysctls: [
            ("net/ipv4/ip_forward".into(), "1".into()),
            ("net/ipv6/conf/all/forwarding".into(), "1".into()),
        ]
        .into(),
        masquerade: Some(Masquerade {
            sources: nets(&["10.244.0.0/16", "fd00:244::/32"]),
            exceptions: nets(&["10.244.0.0/16", "192.0.2.1/32", "192.0.2.2/32", "fd00:244::/32"]),
            internal_links: ["margay0".to_owned(), "mgy*".to_owned()].into(),
        }),
        ..Desired::default()
    }
}

/// Every reconciler of the kernel's own state, in the order of their stages.
struct Kernel {
    reconcilers: Vec<Box<dyn Reconciler>>,
    state: tempfile::TempDir,
}

impl Kernel {
    fn new() -> Self {
        let netlink = Netlink::connect().unwrap();
        let state = tempfile::tempdir().unwrap();
        let mut reconcilers: Vec<Box<dyn Reconciler>> = vec![
            Box::new(SysctlReconciler::new("/proc/sys", state.path().join("sysctls.json"))),
            Box::new(LinkReconciler::new(netlink.clone())),
            Box::new(AddressReconciler::new(netlink.clone())),
            Box::new(NeighbourReconciler::new(netlink.clone())),
            Box::new(RouteReconciler::new(netlink.clone())),
            Box::new(RuleReconciler::new(netlink)),
            Box::new(MasqueradeReconciler::new()),
        ];
        reconcilers.sort_by_key(|reconciler| reconciler.stage());
        Self { reconcilers, state }
    }

    /// One pass of all: (operations, errors).
    async fn pass(&mut self, desired: &Desired) -> (u64, Vec<ReconcileError>) {
        let mut operations = 0;
        let mut errors = Vec::new();
        for reconciler in &mut self.reconcilers {
            let report = reconciler.reconcile(desired).await.unwrap();
            operations += report.operations;
            errors.extend(report.errors);
        }
        (operations, errors)
    }

    /// A pass that must go well and leave nothing to do.
    async fn settle(&mut self, desired: &Desired) -> u64 {
        let (operations, errors) = self.pass(desired).await;
        assert_eq!(errors, []);
        assert_eq!(self.pass(desired).await, (0, vec![]), "a second pass has something to do");
        operations
    }
}

#[test]
fn one_pass_makes_the_kernel_so_and_a_second_finds_nothing_to_do() {
    in_namespaces(async || {
        topology();
        let mut kernel = Kernel::new();
        assert!(kernel.settle(&desired()).await > 10);
        let routes = run("ip route show table 4207");
        assert!(routes.contains("10.244.2.0/24 dev margay0 proto 142 scope link src 192.0.2.1"), "{routes}");
        assert!(routes.contains("unreachable 10.244.0.0/16 proto 142"), "{routes}");
        let routes = run("ip -6 route show table 4207");
        assert!(routes.contains("fd00:244:2::/48 dev margay0 proto 142 src 2001:db8::1"), "{routes}");
        let rules = run("ip rule");
        assert!(rules.contains("30001:	from 10.244.0.0/16 lookup 4208 proto 142"), "{rules}");
        assert_eq!(Kernel::new().pass(&desired()).await, (0, vec![]), "a new agent has nothing to do");
        drop(kernel.state);
    });
}

#[test]
fn drift_is_repaired() {
    in_namespaces(async || {
        topology();
        let mut kernel = Kernel::new();
        kernel.settle(&desired()).await;
        let before = everything();
        for drift in [
            "ip route del 10.244.2.0/24 table 4207",
            "ip -6 route del fd00:244:2::/48 table 4207",
            "ip route del unreachable 10.244.0.0/16 table 4207",
            "ip route flush table 4208",
            "ip route replace 10.244.2.0/24 dev eth9 table 4207 proto 142",
            "ip route replace 10.244.2.0/24 via 192.0.2.9 table 4207 proto 142",
            "ip route add 10.244.9.0/24 dev margay0 table 4207 proto 142",
            "ip rule del priority 30000",
            "ip -6 rule del priority 30001",
            "ip rule add priority 30003 lookup 4208 proto 142",
            "ip rule add priority 30003 fwmark 7 lookup 4208 proto 142",
            "ip addr del 10.244.1.1/32 dev margay0",
            "ip addr add 10.99.0.1/32 dev margay0",
            "ip addr add 10.99.0.1/24 dev mgy0123456789",
            "ip neigh del 10.244.1.2 dev mgy0123456789",
            "ip neigh replace 10.244.1.2 lladdr 02:00:00:00:00:99 dev mgy0123456789 nud permanent",
            "ip neigh add 10.244.1.9 lladdr 02:00:00:00:00:99 dev mgy0123456789 nud permanent",
            "ip link set margay0 mtu 1300",
            "ip link set margay0 down",
            "sysctl -qw net.ipv4.ip_forward=0",
            "nft delete table inet margay",
            "nft flush chain inet margay postrouting",
            "nft insert rule inet margay postrouting accept",
            "nft add element inet margay exceptions4 { 10.0.0.0/16 }",
        ] {
            run(drift);
            let mut operations = 0;
            // A link that comes up again brings its routes one pass later.
            for _ in 0..3 {
                operations += kernel.pass(&desired()).await.0;
            }
            assert!(operations > 0, "nobody noticed: {drift}");
            assert_eq!(everything(), before, "not repaired: {drift}");
        }
    });
}

#[test]
fn cleanup_leaves_exactly_what_was_there_before() {
    in_namespaces(async || {
        topology();
        foreign_state();
        run("ip link set margay0 up mtu 1420");
        run(&format!("ip link set {VETH} mtu 1420"));
        let before = everything();
        let mut kernel = Kernel::new();
        kernel.settle(&desired()).await;
        assert_ne!(everything(), before);
        kernel.reconcilers.reverse();
        kernel.settle(&Desired { prune: true, ..Desired::default() }).await;
        assert_eq!(everything(), before);
    });
}

#[test]
fn nothing_is_removed_before_the_sources_have_synced() {
    in_namespaces(async || {
        topology();
        let mut kernel = Kernel::new();
        kernel.settle(&desired()).await;
        let before = everything();
        assert_eq!(kernel.pass(&Desired::default()).await, (0, vec![]));
        assert_eq!(everything(), before);
    });
}

#[test]
fn a_foreign_rule_on_our_priority_is_named_and_left_alone() {
    in_namespaces(async || {
        topology();
        run("ip rule add priority 30000 from 203.0.113.7 lookup 99");
        let (_, errors) = Kernel::new().pass(&desired()).await;
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].object.contains("priority 30000"), "{errors:?}");
        assert!(run("ip rule").contains("30000:	from 203.0.113.7 lookup 99"));
        assert!(run("ip rule").contains("lookup 4207 proto 142"), "ours is there beside it");
    });
}

#[test]
fn a_foreign_route_in_the_way_is_named_and_left_alone() {
    in_namespaces(async || {
        topology();
        run("ip route add 10.244.2.0/24 dev eth9 table 4207");
        let (_, errors) = Kernel::new().pass(&desired()).await;
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].object.contains("10.244.2.0/24"), "{errors:?}");
        assert!(run("ip route show table 4207").contains("10.244.2.0/24 dev eth9"));
    });
}

#[test]
fn without_the_tunnel_pod_ranges_are_unreachable_and_the_rest_is_done() {
    in_namespaces(async || {
        topology();
        run("ip link del margay0");
        let mut kernel = Kernel::new();
        let (_, errors) = kernel.pass(&desired()).await;
        let objects: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert!(objects.iter().any(|e| e == "device margay0: absent: is mesh-datapath@margay0 running?"));
        assert!(run("ip route get 10.244.1.2").contains(VETH), "local pods are reachable");
        assert!(!succeeds("ip route get 10.244.2.2"), "remote ones never in the clear");
        run("ip tuntap add margay0 mode tun");
        kernel.settle(&desired()).await;
        assert!(run("ip route get 10.244.2.2").contains("dev margay0"));
    });
}

#[test]
fn a_peer_that_leaves_falls_to_the_unreachable_route() {
    in_namespaces(async || {
        topology();
        run("ip route add default via 192.0.2.9");
        let mut kernel = Kernel::new();
        kernel.settle(&desired()).await;
        let mut left = desired();
        left.routes.retain(|route| route.dst != "10.244.2.0/24".parse().unwrap());
        kernel.settle(&left).await;
        assert!(!succeeds("ip route get 10.244.2.2"), "it has the default route now");
    });
}

#[test]
fn no_route_opens_to_a_link_whose_policy_is_not_in_place() {
    in_namespaces(async || {
        topology();
        let mut kernel = Kernel::new();
        let withheld = Desired { withhold: [VETH.to_owned()].into(), ..desired() };
        let (_, errors) = kernel.pass(&withheld).await;
        assert!(errors.iter().all(|error| error.message.contains("withheld")), "{errors:?}");
        assert!(!succeeds("ip route get 10.244.1.2"));
        kernel.settle(&desired()).await;
        assert_eq!(kernel.pass(&withheld).await, (0, vec![]), "what is open stays open");
        assert!(run("ip route get 10.244.1.2").contains(VETH));
    });
}
