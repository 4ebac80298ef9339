#![allow(clippy::unwrap_used)]
//! The laws: nothing in use, reserved or live is handed out; a crash at any byte loses nothing that was
//! promised and keeps nothing that was not; damage is told and never makes two owners.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::snapshot::ObjectRef;

fn ask(container: usize, ips: &[IpAddr]) -> Ask {
    Ask {
        network: "margay".into(),
        container_id: format!("c{container}"),
        ifname: "eth0".into(),
        netns: format!("/run/netns/c{container}"),
        pod: ObjectRef { namespace: "default".into(), name: format!("p{container}") },
        pod_uid: String::new(),
        ips: ips.to_vec(),
    }
}

fn ranges() -> Ranges {
    Ranges {
        cidrs: vec!["10.1.2.0/28".parse().unwrap(), "fd00:1:2::/125".parse().unwrap()],
        pools: vec!["10.1.0.0/16".parse().unwrap(), "fd00:1::/32".parse().unwrap()],
        reserved: ["10.1.2.1", "fd00:1:2::1", "10.1.3.1"].iter().map(|ip| ip.parse().unwrap()).collect(),
        taken: [("10.1.2.7".parse().unwrap(), "pod default/far".to_owned())].into(),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn live(ipam: &Ipam) -> Vec<LiveLink> {
    ipam.leases()
        .map(|lease| LiveLink {
            name: lease.host_interface.clone(),
            ifindex: 9,
            addresses: alias_addresses(&alias(&lease.ips)),
        })
        .collect()
}

fn file(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join(journal::FILE)
}

#[test]
fn addresses_come_in_order_one_of_each_family_and_never_a_special_one() {
    let directory = tempfile::tempdir().unwrap();
    let (mut ipam, issues) = Ipam::open(directory.path(), &[]).unwrap();
    assert!(issues.is_empty());
    let mut got = Vec::new();
    let refused = loop {
        match ipam.allocate(&ask(got.len(), &[]), &ranges()) {
            Ok(lease) => got.push(lease.ips),
            Err(error) => break error,
        }
    };
    assert_eq!(got[0], [ip("10.1.2.2"), ip("fd00:1:2::2")]);
    assert_eq!(got.len(), 6, "{got:?}");
    assert_eq!(got[5], [ip("10.1.2.8"), ip("fd00:1:2::7")], "the far pod's 10.1.2.7 is passed over");
    assert_eq!(refused.to_string(), "no free address left in fd00:1:2::/125");
    assert_eq!(ipam.used(), 12);
}

#[test]
fn a_freed_address_is_reused_last_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let mut v4 = ranges();
    v4.cidrs.pop();
    let (mut ipam, _) = Ipam::open(directory.path(), &[]).unwrap();
    for container in 0..3 {
        ipam.allocate(&ask(container, &[]), &v4).unwrap();
    }
    ipam.release(&ask(1, &[]).key()).unwrap();
    ipam.release(&ask(0, &[]).key()).unwrap();
    let links = live(&ipam);
    drop(ipam);
    let (mut ipam, _) = Ipam::open(directory.path(), &links).unwrap();
    let mut order = Vec::new();
    while let Ok(lease) = ipam.allocate(&ask(10 + order.len(), &[]), &v4) {
        order.push(lease.ips[0]);
    }
    assert_eq!(order.first(), Some(&ip("10.1.2.5")));
    assert_eq!(order[order.len() - 2..], [ip("10.1.2.3"), ip("10.1.2.2")]);
}

#[test]
fn an_exact_address_may_be_outside_the_nodes_range_but_not_outside_the_pools() {
    let directory = tempfile::tempdir().unwrap();
    let (mut ipam, _) = Ipam::open(directory.path(), &[]).unwrap();
    let exact = [ip("fd00:1:ffff::5"), ip("10.1.77.5")];
    assert_eq!(ipam.allocate(&ask(0, &exact), &ranges()).unwrap().ips, exact);
    let refused: [(&str, &str); 9] = [
        ("10.1.77.5", "ips: 10.1.77.5 is in use by pod default/p0 (container c0)"),
        ("10.1.2.7", "ips: 10.1.2.7 is in use by pod default/far"),
        ("10.2.0.5", "ips: 10.2.0.5 is in no pool of this cluster"),
        ("10.1.3.1", "reserved"),
        ("10.1.2.1", "reserved"),
        ("10.1.2.0", "reserved"),
        ("10.1.2.15", "reserved"),
        ("10.1.255.255", "reserved"),
        ("fd00:1:2::", "reserved"),
    ];
    for (address, why) in refused {
        let error = ipam.allocate(&ask(1, &[ip(address)]), &ranges()).unwrap_err().to_string();
        assert!(error.contains(why), "{address}: {error}");
    }
    let two = ipam.allocate(&ask(1, &[ip("10.1.9.1"), ip("10.1.9.2")]), &ranges()).unwrap_err();
    assert!(matches!(two, IpamError::TwoOfFamily(..)));
    assert_eq!(ipam.leases().count(), 1);
}

#[test]
fn a_node_without_a_range_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let (mut ipam, _) = Ipam::open(directory.path(), &[]).unwrap();
    let error = ipam.allocate(&ask(0, &[]), &Ranges::default()).unwrap_err();
    assert!(matches!(error, IpamError::NoCidr));
}

#[test]
fn a_range_too_small_for_pods_is_exhausted_not_a_panic() {
    let allocator = Allocator::default();
    for tiny in ["10.0.0.0/32", "10.0.0.0/31", "255.255.255.255/32", "0.0.0.0/32", "fd00::/128", "fd00::/127"]
    {
        assert_eq!(allocator.choose(&tiny.parse().unwrap(), &|_| false), None, "{tiny}");
    }
    let one = allocator.choose(&"10.0.0.0/30".parse().unwrap(), &|_| false);
    assert_eq!(one, Some(ip("10.0.0.2")));
    assert_eq!(allocator::size(&"10.0.0.0/24".parse().unwrap()), Some(253));
    assert_eq!(allocator::size(&"::/0".parse().unwrap()), None);
}

#[test]
fn a_lease_whose_interface_is_gone_is_released_at_start() {
    let directory = tempfile::tempdir().unwrap();
    let (mut ipam, _) = Ipam::open(directory.path(), &[]).unwrap();
    ipam.allocate(&ask(0, &[]), &ranges()).unwrap();
    let kept = ipam.allocate(&ask(1, &[]), &ranges()).unwrap();
    let links: Vec<LiveLink> =
        live(&ipam).into_iter().filter(|link| link.name == kept.host_interface).collect();
    drop(ipam);
    let (ipam, issues) = Ipam::open(directory.path(), &links).unwrap();
    assert_eq!(ipam.leases().cloned().collect::<Vec<_>>(), [kept]);
    assert!(issues.is_empty());
}

#[test]
fn a_live_interface_without_a_record_keeps_its_addresses() {
    let directory = tempfile::tempdir().unwrap();
    let stray = |addresses| LiveLink { name: "mgy0000000000".into(), ifindex: 4, addresses };
    let (mut ipam, issues) = Ipam::open(directory.path(), &[stray(Some(vec![ip("10.1.2.2")]))]).unwrap();
    assert_eq!(issues[0].reason, "IpamStrayInterface");
    assert_eq!(ipam.allocate(&ask(0, &[]), &ranges()).unwrap().ips[0], ip("10.1.2.3"));
    let error = ipam.allocate(&ask(1, &[ip("10.1.2.2")]), &ranges()).unwrap_err().to_string();
    assert_eq!(error, "ips: 10.1.2.2 is in use by interface mgy0000000000");
    ipam.set_live(&[stray(None)]);
    let error = ipam.allocate(&ask(1, &[]), &ranges()).unwrap_err();
    assert!(matches!(error, IpamError::UnknownInterface(_)), "{error}");
    ipam.set_live(&[]);
    ipam.allocate(&ask(1, &[]), &ranges()).unwrap();
}

#[test]
fn a_second_agent_on_one_journal_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let _first = Ipam::open(directory.path(), &[]).unwrap();
    let second = Ipam::open(directory.path(), &[]).unwrap_err().to_string();
    assert!(second.starts_with("cannot lock"), "{second}");
}

#[test]
fn a_newer_agents_journal_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    drop(Ipam::open(directory.path(), &[]).unwrap());
    let json = br#"{"seq":1,"record":{"begin":{"version":2}}}"#;
    let sum: String =
        <sha2::Sha256 as sha2::Digest>::digest(json)[..8].iter().map(|b| format!("{b:02x}")).collect();
    let newer = format!("{sum} {}\n", String::from_utf8_lossy(json));
    std::fs::write(file(&directory), &newer).unwrap();
    let error = Ipam::open(directory.path(), &[]).unwrap_err();
    assert!(matches!(error, JournalError::Version { version: 2, .. }), "{error}");
    assert_eq!(std::fs::read_to_string(file(&directory)).unwrap(), newer);
}

#[test]
fn a_long_journal_is_rewritten_and_says_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let (mut ipam, _) = Ipam::open(directory.path(), &[]).unwrap();
    let kept = ipam.allocate(&ask(0, &[]), &ranges()).unwrap();
    for round in 1..800 {
        ipam.allocate(&ask(round, &[]), &ranges()).unwrap();
        ipam.release(&ask(round, &[]).key()).unwrap();
    }
    let length = std::fs::read(file(&directory)).unwrap().iter().filter(|byte| **byte == b'\n').count();
    assert!(length < 1200, "{length} lines");
    let links = live(&ipam);
    let next = ipam.allocate(&ask(900, &[]), &ranges()).unwrap().ips;
    ipam.release(&ask(900, &[]).key()).unwrap();
    drop(ipam);
    let (ipam, issues) = Ipam::open(directory.path(), &links).unwrap();
    assert!(issues.is_empty());
    assert_eq!(ipam.leases().cloned().collect::<Vec<_>>(), [kept]);
    assert_eq!(ipam.allocator.freed().last(), next.last().copied());
}

/// One change to the journal.
#[derive(Debug, Clone)]
enum Step {
    Any(usize),
    Exact(usize, u8),
    Release(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0usize..8).prop_map(Step::Any),
        1 => (0usize..8, any::<u8>()).prop_map(|(who, last)| Step::Exact(who, last)),
        2 => (0usize..8).prop_map(Step::Release),
    ];
    prop::collection::vec(step, 1..12)
}

/// Length of the journal and the leases at one moment.
type Moment = (usize, BTreeMap<Key, Lease>);

/// Runs the steps; returns the journal's bytes and the leases after each number of them.
fn run(directory: &tempfile::TempDir, steps: &[Step]) -> (Vec<u8>, Vec<Moment>) {
    let (mut ipam, _) = Ipam::open(directory.path(), &[]).unwrap();
    let length = || std::fs::metadata(file(directory)).unwrap().len() as usize;
    let mut history = vec![(0, BTreeMap::new()), (length(), BTreeMap::new())];
    for step in steps {
        match step {
            Step::Any(who) | Step::Exact(who, _) if ipam.lease(&ask(*who, &[]).key()).is_some() => {}
            Step::Any(who) => drop(ipam.allocate(&ask(*who, &[]), &ranges())),
            Step::Exact(who, last) => {
                let exact = IpAddr::from([10, 1, 2, *last]);
                drop(ipam.allocate(&ask(*who, &[exact]), &ranges()));
            }
            Step::Release(who) => drop(ipam.release(&ask(*who, &[]).key()).unwrap()),
        }
        history.push((length(), ipam.leases.clone()));
    }
    (std::fs::read(file(directory)).unwrap(), history)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_at_any_byte_leaves_exactly_the_records_before_it(steps in steps()) {
        let directory = tempfile::tempdir().unwrap();
        let (bytes, history) = run(&directory, &steps);
        for cut in 0..=bytes.len() {
            let replayed = journal::replay(&bytes[..cut]);
            let (_, expected) = history.iter().rev().find(|(length, _)| *length <= cut).unwrap();
            prop_assert_eq!(&replayed.state.leases, expected, "cut at {}", cut);
            prop_assert!(replayed.damage.is_empty(), "cut at {}: {:?}", cut, replayed.damage);
        }
    }

    #[test]
    fn a_changed_byte_is_told_and_never_invents_or_moves_a_lease(steps in steps(), flip in 1u8..) {
        let directory = tempfile::tempdir().unwrap();
        let (bytes, history) = run(&directory, &steps);
        let ever: Vec<&Lease> = history.iter().flat_map(|(_, leases)| leases.values()).collect();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= flip;
            let replayed = journal::replay(&changed);
            // Only the last line feed can go without a word: it makes its record a torn tail.
            prop_assert!(!replayed.damage.is_empty() || at + 1 == bytes.len(), "byte {} changed unseen", at);
            let mut owners = BTreeMap::new();
            for lease in replayed.state.leases.values() {
                prop_assert!(ever.contains(&lease));
                for ip in &lease.ips {
                    prop_assert!(owners.insert(*ip, lease.key()).is_none(), "{} has two owners", ip);
                }
            }
        }
    }

    #[test]
    fn after_any_damage_no_live_address_is_handed_out(
        steps in steps(), at in any::<prop::sample::Index>(), cut in any::<bool>(), flip in 1u8..
    ) {
        let directory = tempfile::tempdir().unwrap();
        let (mut bytes, history) = run(&directory, &steps);
        let alive = &history.last().unwrap().1;
        let links: Vec<LiveLink> = alive.values().map(|lease| LiveLink {
            name: lease.host_interface.clone(),
            ifindex: 3,
            addresses: Some(lease.ips.clone()),
        }).collect();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        std::fs::write(file(&directory), &bytes).unwrap();
        let opened = Ipam::open(directory.path(), &links);
        prop_assert!(opened.is_ok(), "{:?}", opened);
        let (mut ipam, issues) = opened.unwrap();
        if ipam.journal_was_damaged(&issues) {
            let aside = file(&directory).with_extension("journal.damaged.1");
            prop_assert_eq!(std::fs::read(aside).unwrap(), bytes);
        }
        let used: BTreeSet<IpAddr> = alive.values().flat_map(|lease| lease.ips.clone()).collect();
        let mut given = BTreeSet::new();
        let mut next = 100;
        while let Ok(lease) = ipam.allocate(&ask(next, &[]), &ranges()) {
            for ip in lease.ips {
                prop_assert!(!used.contains(&ip), "{} is live", ip);
                prop_assert!(given.insert(ip), "{} was handed out twice", ip);
            }
            next += 1;
        }
        // Opened again, the journal is sound.
        let links: Vec<LiveLink> = links.into_iter().chain(live(&ipam)).collect();
        drop(ipam);
        let (_, issues) = Ipam::open(directory.path(), &links).unwrap();
        prop_assert!(issues.iter().all(|issue| issue.reason != "IpamJournalDamaged"), "{:?}", issues);
    }

    #[test]
    fn any_bytes_at_all_have_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let replayed = journal::replay(&bytes);
        prop_assert!(replayed.state.leases.is_empty());
    }

    #[test]
    fn the_choice_is_the_lowest_never_used_else_the_longest_free(
        uses in prop::collection::vec((2u8..14, any::<bool>()), 0..40), blocked in 2u8..14
    ) {
        let cidr: IpNet = "10.1.2.0/28".parse().unwrap();
        let lease = |last: u8| ask(last as usize, &[]).lease("x".into(), [0; 6], vec![IpAddr::from([10, 1, 2, last])]);
        let mut allocator = Allocator::default();
        let (mut used, mut freed): (Vec<u8>, Vec<u8>) = (Vec::new(), Vec::new());
        for (last, take) in uses {
            let held = used.contains(&last);
            if take && !held {
                allocator.take(&lease(last));
                used.push(last);
                freed.retain(|f| *f != last);
            } else if !take && held {
                allocator.free(&lease(last));
                used.retain(|u| *u != last);
                freed.push(last);
            }
        }
        let fresh = (2..15).find(|last| !used.contains(last) && !freed.contains(last) && *last != blocked);
        let naive = fresh.or_else(|| freed.iter().copied().find(|last| *last != blocked));
        let chosen = allocator.choose(&cidr, &|ip| ip == IpAddr::from([10, 1, 2, blocked]));
        prop_assert_eq!(chosen, naive.map(|last| IpAddr::from([10, 1, 2, last])));
    }
}

impl Ipam {
    fn journal_was_damaged(&self, issues: &[Issue]) -> bool {
        issues.iter().any(|issue| issue.reason == "IpamJournalDamaged")
    }
}
