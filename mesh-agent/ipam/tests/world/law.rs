//! What must hold whatever happened.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_ipam::block::Block;
use mesh_ipam::object::Allocation;

use super::World;

impl World {
    fn entries(&self) -> BTreeMap<IpAddr, Vec<(Block, Allocation)>> {
        let mut entries: BTreeMap<IpAddr, Vec<(Block, Allocation)>> = BTreeMap::new();
        for stored in self.memory.blocks() {
            for (ip, entry) in &stored.block.allocations {
                entries.entry(*ip).or_default().push((stored.block.clone(), entry.clone()));
            }
        }
        entries
    }

    /// After every step.
    pub fn check_always(&self) {
        let entries = self.entries();
        let mut users: BTreeMap<IpAddr, String> = BTreeMap::new();
        for machine in self.machines.iter().filter(|machine| machine.agent.is_some()) {
            let Some(agent) = &machine.agent else { continue };
            let who = format!("{}/{}", machine.identity.node, machine.identity.instance);
            let disk = machine.disk.lock().unwrap();
            let trusted = agent.is_trusted(self.now);
            let mut live: BTreeSet<IpAddr> = BTreeSet::new();
            if !self.is_outcast(machine) {
                live.extend(disk.leases.keys());
            }
            if trusted {
                live.extend(agent.holdings().addresses.keys());
            }
            // No address is live twice, nor ready here and live there.
            for ip in &live {
                if let Some(other) = users.insert(*ip, who.clone()) {
                    panic!("{ip} is {other}'s and {who}'s");
                }
            }
            // What is in the holdings is in the blocks.
            for ip in agent.holdings().addresses.keys().filter(|_| trusted) {
                let held = entries.get(ip).into_iter().flatten().any(|(_, entry)| {
                    entry.node == machine.identity.node && entry.instance == machine.identity.instance
                });
                assert!(held, "{who} believes that {ip} is its own");
            }
        }
    }

    /// After trouble is over and everybody has had time: nothing is lost, nothing left over.
    pub fn check_settled(&self) {
        let api = self.api.lock().unwrap();
        let catalogue = api.catalogue();
        let mut wanted: BTreeSet<(IpAddr, String)> = BTreeSet::new();
        let mut ready: BTreeSet<(IpAddr, String)> = BTreeSet::new();
        for machine in self.machines.iter().filter(|machine| machine.replaced.is_none()) {
            let Some(agent) = &machine.agent else { continue };
            let disk = machine.disk.lock().unwrap();
            assert!(agent.is_trusted(self.now), "{} is not confirmed", machine.identity.node);
            let node = &machine.identity.node;
            for (ip, handle) in &disk.leases {
                if catalogue.pool_of(*ip).is_some() {
                    wanted.insert((*ip, format!("{node} {handle}")));
                }
            }
            let holdings = agent.holdings();
            let tunnels = holdings.tunnels.iter().filter(|ip| holdings.addresses.contains_key(*ip));
            wanted.extend(tunnels.map(|ip| (*ip, format!("{node} tunnel"))));
            let idle = |ip: &&IpAddr| !disk.leases.contains_key(*ip) && !holdings.tunnels.contains(*ip);
            ready.extend(holdings.addresses.keys().filter(idle).map(|ip| (*ip, node.clone())));
        }
        drop(api);
        let (mut found, mut kept) = (BTreeSet::new(), BTreeSet::new());
        let nodes: Vec<String> = self.api.lock().unwrap().nodes.keys().cloned().collect();
        let blocks = self.memory.blocks();
        for (at, stored) in blocks.iter().enumerate() {
            let block = &stored.block;
            assert!(block.affinity.iter().all(|node| nodes.contains(node)), "{block:?}");
            assert!(!block.allocations.is_empty() || block.affinity.is_some(), "{block:?}");
            for other in &blocks[..at] {
                let other = &other.block.cidr;
                assert!(
                    !other.contains(&block.cidr) && !block.cidr.contains(other),
                    "{other} {}",
                    block.cidr
                );
            }
            for (ip, entry) in &block.allocations {
                match &entry.handle {
                    Some(handle) => {
                        found.insert((*ip, format!("{} {handle}", entry.node)));
                    }
                    None => drop(kept.insert((*ip, entry.node.clone()))),
                }
            }
        }
        // What is in use outside of every pool stays written until it goes.
        found.retain(|(ip, _)| catalogue.pool_of(*ip).is_some());
        assert_eq!(found, wanted);
        assert_eq!(kept, ready);
        let most = 2 * super::SETTINGS.high * nodes.len();
        assert!(kept.len() <= most, "{} addresses are kept ready", kept.len());
    }

    /// That a node may say that nothing is left: no usable address of a pool that lends, or of its own blocks,
    /// is nobody's.
    pub fn check_exhausted(&self, node: &str, v4: bool) {
        let catalogue = self.api.lock().unwrap().catalogue();
        let blocks = self.memory.blocks();
        let entries = self.entries();
        for pool in catalogue.pools.iter().filter(|pool| pool.cidr.addr().is_ipv4() == v4 && !pool.disabled) {
            for ip in pool.cidr.hosts().filter(|ip| catalogue.is_usable(*ip) && !entries.contains_key(ip)) {
                let home = blocks.iter().find(|stored| stored.block.cidr.contains(&ip));
                match home.map(|stored| &stored.block) {
                    Some(block) => {
                        let own = block.affinity.as_deref().is_none_or(|owner| owner == node);
                        assert!(!own && !pool.allow_borrowing, "{ip} is free in {block:?}");
                    }
                    None => {
                        // A place is none where a block of another size lies across it.
                        let place = mesh_ipam::block::cidr_of(&mesh_ipam::block::name(
                            &ipnet::IpNet::new(ip, pool.block_size).unwrap().trunc(),
                        ));
                        let across = blocks.iter().any(|stored| {
                            place.is_some_and(|p| {
                                p.contains(&stored.block.cidr) || stored.block.cidr.contains(&p)
                            })
                        });
                        assert!(across, "{ip} is in no block");
                    }
                }
            }
        }
    }
}
