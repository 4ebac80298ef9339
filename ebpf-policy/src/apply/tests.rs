//! The laws of `apply`, over maps in memory that watch every single write.

#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use aya::maps::MapError;
use aya::sys::SyscallError;
use proptest::collection::vec;
use proptest::prelude::*;

use margay_bpf::layout::range;
use margay_bpf::verdict::Policy as _;

use super::*;
use crate::maps::Store;
use crate::model::{ClusterView, Direction, LocalEndpoint, Ranges};
use crate::reference::Flow;

#[path = "../../tests/common/cluster.rs"]
mod cluster;

use cluster::{address, any_address, cluster, local, policies, port_number};

/// What stands in for the kernel.
#[derive(Default)]
struct World {
    maps: Compiled,
    revision: u32,
    operations: usize,
    fails_at: Option<usize>,
    /// From here on every operation fails: the agent is dead.
    dies_at: Option<usize>,
    /// Judged after every operation: never allowed unless one of `legal` allows it.
    flows: Vec<(u32, Flow)>,
    legal: Vec<Compiled>,
    /// An address that must never be a legal source behind the tunnel.
    never_remote: Option<std::net::IpAddr>,
}

impl World {
    fn operation(&mut self, change: impl FnOnce(&mut Self)) -> Result<(), MapError> {
        self.operations += 1;
        let dead = self.dies_at.is_some_and(|at| self.operations >= at);
        if dead || self.fails_at == Some(self.operations) {
            let io_error = io::Error::from_raw_os_error(libc::ENOMEM);
            return Err(SyscallError { call: "bpf_map_update_elem", io_error }.into());
        }
        change(self);
        for (ifindex, flow) in &self.flows {
            let open = self.maps.explain(*ifindex, flow).allows();
            let legal = self.legal.iter().any(|maps| maps.explain(*ifindex, flow).allows());
            assert!(!open || legal, "{ifindex} {flow:?} was open for a moment");
        }
        let owner = self.never_remote.and_then(|ip| self.maps.range(&crate::compile::addr(ip)));
        assert_ne!(owner, Some(range::REMOTE), "a forged source was legal for a moment");
        Ok(())
    }
}

/// One map of the world, picked by a function.
struct InWorld<K, V> {
    world: Arc<Mutex<World>>,
    pick: fn(&mut Compiled) -> &mut BTreeMap<K, V>,
}

impl<K: Ord + Copy, V: Copy> Store<K, V> for InWorld<K, V> {
    fn load(&self) -> Result<BTreeMap<K, V>, MapError> {
        Ok((self.pick)(&mut self.world.lock().unwrap().maps).clone())
    }
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        self.world.lock().unwrap().operation(|world| {
            (self.pick)(&mut world.maps).insert(*key, *value);
        })
    }
    fn delete(&mut self, key: &K) -> Result<(), MapError> {
        self.world.lock().unwrap().operation(|world| {
            (self.pick)(&mut world.maps).remove(key);
        })
    }
}

struct ConfigInWorld(Arc<Mutex<World>>);

impl Store<u32, Config> for ConfigInWorld {
    fn load(&self) -> Result<BTreeMap<u32, Config>, MapError> {
        let revision = self.0.lock().unwrap().revision;
        Ok([(0, Config { layout: LAYOUT_VERSION, revision })].into())
    }
    fn put(&mut self, _: &u32, value: &Config) -> Result<(), MapError> {
        self.0.lock().unwrap().operation(|world| world.revision = value.revision)
    }
    fn delete(&mut self, _: &u32) -> Result<(), MapError> {
        Ok(())
    }
}

fn state(world: &Arc<Mutex<World>>) -> State {
    macro_rules! mirror {
        ($field:ident) => {
            Mirror::open("", InWorld { world: world.clone(), pick: |maps| &mut maps.$field }).unwrap()
        };
    }
    State {
        config: Mirror::open("", ConfigInWorld(world.clone())).unwrap(),
        endpoints: mirror!(endpoints),
        addresses: mirror!(addresses),
        prefixes: mirror!(prefixes),
        sets: mirror!(sets),
        tables: mirror!(tables),
        services: mirror!(services),
        ranges: mirror!(ranges),
        unsettled: true,
    }
}

/// Endpoints of one, addresses of the other: since ids keep their meaning, sets and tables may stand side by side.
fn mixed(endpoints: &Compiled, addresses: &Compiled) -> Compiled {
    let mut mixed = endpoints.clone();
    mixed.addresses = addresses.addresses.clone();
    mixed.prefixes = addresses.prefixes.clone();
    mixed.sets.extend(&addresses.sets);
    mixed.tables.extend(&addresses.tables);
    mixed
}

fn flows() -> impl Strategy<Value = Vec<(u32, Flow)>> {
    let flow =
        (11u32..13, any::<bool>(), any_address(), prop::sample::select(vec![6u8, 17, 1]), port_number());
    let flow = flow.prop_map(|(ifindex, ingress, remote, protocol, port)| {
        let direction = if ingress { Direction::Ingress } else { Direction::Egress };
        (ifindex, Flow { direction, remote, protocol, port })
    });
    vec(flow, 1..12)
}

/// Two states of one cluster: other policies, and pods that swapped labels.
fn change() -> impl Strategy<Value = (Compiled, Compiled)> {
    (cluster(), policies(), any::<bool>()).prop_map(|(before, policies, swap)| {
        let mut after = ClusterView { policies, ..before.clone() };
        if swap && let [first, .., last] = &mut after.pods[..] {
            std::mem::swap(&mut Arc::make_mut(first).labels, &mut Arc::make_mut(last).labels);
        }
        let compiled = |view: &ClusterView| compile(view, &local(view, [11, 12]));
        (compiled(&before), compiled(&after))
    })
}

fn compile(view: &ClusterView, local: &[LocalEndpoint]) -> Compiled {
    crate::compile(view, local, &Ranges::default())
}

fn same_maps(world: &World, wanted: &Compiled) -> bool {
    Compiled { names: wanted.names.clone(), ..world.maps.clone() } == *wanted
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_open_in_between((old, new) in change(), flows in flows()) {
        let world = Arc::new(Mutex::new(World::default()));
        let mut state = state(&world);
        state.apply(&old).unwrap();
        {
            let mut world = world.lock().unwrap();
            prop_assert!(same_maps(&world, &old));
            world.legal = vec![old.clone(), mixed(&old, &new), mixed(&new, &old), new.clone()];
            world.flows = flows;
        }
        let revision = world.lock().unwrap().revision;
        let report = state.apply(&new).unwrap();
        let world = world.lock().unwrap();
        prop_assert!(same_maps(&world, &new));
        prop_assert_eq!(world.revision != revision, report != ApplyReport::default());
    }

    #[test]
    fn applying_twice_changes_nothing((_, new) in change()) {
        let world = Arc::new(Mutex::new(World::default()));
        let mut state = state(&world);
        state.apply(&new).unwrap();
        let operations = world.lock().unwrap().operations;
        prop_assert_eq!(state.apply(&new).unwrap(), ApplyReport::default());
        prop_assert_eq!(world.lock().unwrap().operations, operations);
    }

    #[test]
    fn an_agent_that_dies_halfway_leaves_nothing_open_and_its_successor_finishes(
        (old, new) in change(),
        flows in flows(),
        at in 1usize..40,
    ) {
        let world = Arc::new(Mutex::new(World::default()));
        let mut first = state(&world);
        first.apply(&old).unwrap();
        let revision = {
            let mut world = world.lock().unwrap();
            world.legal = vec![old.clone(), mixed(&old, &new), mixed(&new, &old), new.clone()];
            world.flows = flows;
            world.dies_at = Some(world.operations + at);
            world.revision
        };
        let _ = first.apply(&new);
        drop(first);
        world.lock().unwrap().dies_at = None;
        state(&world).apply(&new).unwrap();
        let world = world.lock().unwrap();
        prop_assert!(same_maps(&world, &new));
        prop_assert!(world.revision > revision, "connections are never judged under the new policy");
    }

    #[test]
    fn a_failed_write_closes_every_endpoint_and_the_next_apply_heals((old, new) in change(), at in 1usize..40) {
        let world = Arc::new(Mutex::new(World::default()));
        let mut state = state(&world);
        state.apply(&old).unwrap();
        let before = world.lock().unwrap().operations;
        world.lock().unwrap().fails_at = Some(before + at);
        match state.apply(&new) {
            Ok(_) => prop_assert!(world.lock().unwrap().operations < before + at, "a failure went unnoticed"),
            Err(Error::Closed { closed, .. }) => {
                let world = world.lock().unwrap();
                prop_assert_eq!(closed, world.maps.endpoints.len());
                prop_assert!(world.maps.endpoints.values().all(|endpoint| endpoint.closed == 1));
                prop_assert!(new.endpoints.keys().all(|ifindex| world.maps.endpoints.contains_key(ifindex)));
            }
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        }
        state.apply(&new).unwrap();
        prop_assert!(same_maps(&world.lock().unwrap(), &new));
    }
}

#[test]
fn our_own_range_is_there_before_the_remote_one_around_it() {
    let compiled = |remote: &[&str], own: &[&str]| {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect();
        crate::compile(&ClusterView::default(), &[], &Ranges { remote: nets(remote), own: nets(own) })
    };
    let world = Arc::new(Mutex::new(World { never_remote: Some(address(false, 5)), ..World::default() }));
    let mut state = state(&world);
    state.apply(&compiled(&["10.0.0.0/8"], &["10.0.0.0/24"])).unwrap();
    state.apply(&compiled(&["10.0.0.0/8"], &["10.0.0.4/30", "10.0.0.0/29"])).unwrap();
    state.apply(&compiled(&[], &["10.0.0.0/7"])).unwrap();
}
