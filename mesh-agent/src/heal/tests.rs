#![allow(clippy::unwrap_used)]

use super::*;
use std::net::SocketAddr;

use proptest::collection::vec;
use proptest::prelude::*;

fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n; 32])
}

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51820))
}

fn epoch() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
}

/// One device, read every second.
struct World {
    start: Instant,
    second: u64,
    device: Device,
    healer: Healer,
}

impl World {
    fn new(peers: u8) -> Self {
        let peers = (1..=peers).map(|n| (key(n), Peer { endpoint: Some(at(n)), ..Peer::default() }));
        let device = Device { peers: peers.collect(), ..Device::default() };
        let mut world = Self { start: Instant::now(), second: 0, device, healer: Healer::default() };
        world.read();
        world
    }

    fn peer(&mut self, n: u8) -> &mut Peer {
        self.device.peers.get_mut(&key(n)).unwrap()
    }

    fn wall(&self) -> SystemTime {
        epoch() + Duration::from_secs(self.second)
    }

    fn sends(&mut self, n: u8) {
        self.peer(n).tx_bytes += 148;
    }

    fn hears(&mut self, n: u8) {
        self.peer(n).rx_bytes += 92;
    }

    fn shakes_hands(&mut self, n: u8) {
        let wall = self.wall();
        self.hears(n);
        self.peer(n).last_handshake = Some(wall);
    }

    fn read(&mut self) {
        let now = self.start + Duration::from_secs(self.second);
        self.healer.observe("margay0", &self.device, now, self.wall());
        self.second += 1;
    }

    fn reach(&self, n: u8) -> Reach {
        self.healer.reach().remove(&key(n)).unwrap_or_default()
    }

    /// Sends for so many seconds to a silent peer; the seconds at which it was tried.
    fn shouts(&mut self, n: u8, seconds: u64) -> Vec<u64> {
        let mut tried = Vec::new();
        let from = self.second;
        for _ in 0..seconds {
            let before = self.reach(n).attempt;
            self.sends(n);
            self.read();
            if self.reach(n).attempt > before {
                tried.push(self.second - 1 - from);
            }
        }
        tried
    }
}

#[test]
fn a_peer_that_never_answered_is_tried_elsewhere_after_one_retry() {
    let mut world = World::new(1);
    let tried = world.shouts(1, 30);
    assert_eq!(tried, [6, 12, 18, 24]);
    assert_eq!(world.reach(1).failed, [at(1)]);
}

#[test]
fn a_session_that_dies_gets_a_handshake_first_and_another_endpoint_next() {
    let mut world = World::new(1);
    world.shakes_hands(1);
    world.read();
    let tried = world.shouts(1, 18);
    assert_eq!(tried, [13], "10 s are the peer's by right");
    assert!(world.reach(1).failed.is_empty());
    assert_eq!(world.shouts(1, 3).len(), 1);
    assert_eq!(world.reach(1).failed, [at(1)]);
}

#[test]
fn one_way_traffic_with_passive_keepalives_is_left_alone() {
    let mut world = World::new(1);
    world.shakes_hands(1);
    for second in 0..170u64 {
        world.sends(1);
        if second % 12 == 11 {
            world.hears(1);
        }
        world.read();
    }
    assert_eq!(world.reach(1), Reach::default());
}

#[test]
fn silence_that_nobody_minds_is_left_alone() {
    let mut world = World::new(1);
    world.sends(1);
    for _ in 0..600 {
        world.read();
    }
    // One packet unanswered is tried once: afterwards nobody wants anything.
    assert!(world.reach(1).attempt <= 1, "{:?}", world.reach(1));
    assert!(
        world.healer.health(world.start + Duration::from_secs(600))[&("margay0".into(), key(1))]
            .silent
            .is_none()
    );
}

#[test]
fn attempts_do_not_keep_themselves_going() {
    // A device that retries for 90 s after each attempt, and an application that stopped.
    let mut world = World::new(1);
    world.shouts(1, 10);
    let mut until = world.second + 90;
    let mut last = world.reach(1).attempt;
    for _ in 0..3600 {
        if world.second < until && world.second.is_multiple_of(5) {
            world.sends(1);
        }
        world.read();
        if world.reach(1).attempt > last {
            last = world.reach(1).attempt;
            until = world.second + 90;
        }
    }
    assert!(last <= u64::from(EAGER), "{last}");
}

#[test]
fn a_restarted_device_starts_with_a_clean_slate() {
    let mut world = World::new(1);
    world.shouts(1, 5);
    world.peer(1).tx_bytes = 0;
    world.read();
    assert_eq!(world.shouts(1, 6), Vec::<u64>::new());
    world.healer.device_lost("margay0");
    assert_eq!(world.shouts(1, 6), Vec::<u64>::new());
}

#[test]
fn when_all_are_gone_attempts_are_spread() {
    let mut world = World::new(200);
    let mut before = 0;
    for _ in 0..20 {
        (1..=200).for_each(|n| world.sends(n));
        world.read();
        let all: u64 = world.healer.reach().values().map(|reach| reach.attempt).sum();
        assert!(all - before <= AT_ONCE as u64);
        before = all;
    }
    assert_eq!(world.healer.reach().len(), 200);
}

proptest! {
    /// Whoever answers in time is never touched, whatever happens to the others.
    #[test]
    fn only_silent_peers_are_touched(
        steps in vec((any::<bool>(), any::<bool>(), 0u64..12), 1..60),
    ) {
        let mut world = World::new(2);
        world.shakes_hands(2);
        let mut owed = 0;
        for (first, second, patience) in steps {
            if first {
                world.sends(1);
            }
            if second {
                world.sends(2);
            }
            owed = if second || owed > 0 { owed + 1 } else { 0 };
            if owed > patience {
                world.shakes_hands(2);
                owed = 0;
            }
            world.read();
            prop_assert_eq!(world.reach(2), Reach::default());
        }
    }

    /// A peer with several endpoints, of which one works, is found whatever its place; and stays there.
    #[test]
    fn a_working_endpoint_is_found(count in 1u8..6, works in 0u8..6, first in 0u8..6) {
        let works = works % count;
        let candidates: Vec<SocketAddr> = (0..count).map(at).collect();
        let mut world = World::new(1);
        world.peer(1).endpoint = Some(candidates[usize::from(first % count)]);
        let mut found = None;
        for second in 0..120u64 {
            world.sends(1);
            if world.peer(1).endpoint == Some(at(works)) {
                world.shakes_hands(1);
                found.get_or_insert(second);
            }
            let before = world.reach(1).attempt;
            world.read();
            let reach = world.reach(1);
            if reach.attempt > before {
                world.peer(1).endpoint = reach.choose(&candidates);
            }
            prop_assert!(reach.failed.len() <= REMEMBERED);
        }
        prop_assert!(found.is_some_and(|second| second <= 60), "{:?}", found);
        // What failed stays avoided, so that the plan does not lead back to it.
        if found != Some(0) {
            prop_assert_eq!(world.reach(1).choose(&candidates), Some(at(works)));
        }
        prop_assert_eq!(world.peer(1).endpoint, Some(at(works)));
    }

    #[test]
    fn of_candidates_that_all_failed_the_one_that_did_longest_ago_is_next(
        failed in vec(0u8..6, 0..10), candidates in vec(0u8..6, 0..6),
    ) {
        let mut reach = Reach::default();
        for n in failed {
            reach.failed.retain(|known| *known != at(n));
            reach.failed.push(at(n));
        }
        let candidates: Vec<_> = candidates.into_iter().map(at).collect();
        let chosen = reach.choose(&candidates);
        prop_assert_eq!(chosen.is_none(), candidates.is_empty());
        let fresh: Vec<_> = candidates.iter().filter(|to| !reach.failed.contains(to)).collect();
        match fresh.first() {
            Some(first) => prop_assert_eq!(chosen, Some(**first)),
            None => {
                let oldest = reach.failed.iter().find(|failed| candidates.contains(failed));
                prop_assert_eq!(chosen, oldest.copied());
            }
        }
    }
}
