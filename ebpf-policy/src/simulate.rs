//! The verdict on the host: the kernel's own code over compiled state in memory.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use margay_bpf::layout::{
    Addr, Address, ConnKey, Connection, Decision, Endpoint, FragmentKey, IdentityId, ServiceKey, SetKey,
    TableId, TableKey,
};
use margay_bpf::parse::{self, Packet, Start};
use margay_bpf::verdict::{self, Hook, Maps, Policy, Verdict};

use crate::compile::{Compiled, Prefix, TablePrefix, addr};
use crate::model::Direction;
use crate::reference::{Answer, Flow};

/// Maps in memory, with connections of their own.
#[derive(Debug, Default)]
pub struct Simulation {
    compiled: Compiled,
    revision: u32,
    /// Monotonic time, ns; moved by whoever simulates.
    pub now: Cell<u64>,
    connections: RefCell<HashMap<ConnKey, Rc<Connection>>>,
    fragments: RefCell<HashMap<FragmentKey, u64>>,
}

impl Simulation {
    /// Maps that hold what was compiled.
    pub fn new(compiled: Compiled) -> Self {
        Self { compiled, ..Self::default() }
    }

    /// Changes the policy, as the enforcer does: connections stay, and are judged again.
    pub fn apply(&mut self, compiled: Compiled) {
        if self.compiled != compiled {
            self.compiled = compiled;
            self.revision += 1;
        }
    }

    /// Judges a packet to or from a pod.
    pub fn judge(&self, hook: Hook, bytes: &[u8]) -> Verdict {
        verdict::judge_pod(self, bytes, Start::Ethernet, hook, &mut Packet::default())
    }

    /// Judges a packet that came in by device `input` where it leaves the node's stack.
    pub fn judge_exit(&self, input: u32, bytes: &[u8]) -> Verdict {
        verdict::judge_exit(self, bytes, Start::Ethernet, input, &mut Packet::default()).1
    }

    /// Judges a packet to a socket of the host. `None` if no pod sent it, or if it cannot be parsed.
    pub fn judge_host(&self, bytes: &[u8]) -> Option<Verdict> {
        let mut packet = Packet::default();
        parse::packet(bytes, Start::Ethernet, &mut packet).ok()?;
        verdict::judge_host(self, &packet).map(|(_, verdict)| verdict)
    }

    /// Judges a packet out of the tunnel.
    pub fn judge_tunnel(&self, bytes: &[u8]) -> Verdict {
        verdict::judge_tunnel(self, bytes, &mut Packet::default())
    }
}

impl Compiled {
    /// What the compiled state says about a new connection at an endpoint, to be compared with
    /// [`crate::reference::evaluate`].
    pub fn explain(&self, ifindex: u32, flow: &Flow) -> Answer {
        let Some(endpoint) = self.endpoints.get(&ifindex).filter(|endpoint| endpoint.closed == 0) else {
            return Answer::Closed;
        };
        let to_pod = flow.direction == Direction::Ingress;
        let verdict =
            verdict::judge_new(self, endpoint, to_pod, &addr(flow.remote), flow.protocol, flow.port);
        self.answer(&verdict)
    }

    /// A verdict of policy in words.
    fn answer(&self, verdict: &Verdict) -> Answer {
        match self.names.rules.get(&verdict.rule) {
            Some(rule) if verdict.reason.allows() => Answer::Allowed(rule.clone()),
            _ if verdict.reason.allows() => Answer::NotIsolated,
            _ => Answer::Denied(self.names.sets.get(&verdict.set).cloned().unwrap_or_default()),
        }
    }

    /// The endpoint that owns an address here.
    pub fn endpoint_of(&self, address: IpAddr) -> Option<u32> {
        self.addresses.get(&addr(address)).map(|address| address.ifindex).filter(|ifindex| *ifindex != 0)
    }
}

fn longest<V: Copy>(map: &BTreeMap<Prefix, V>, address: &Addr) -> Option<V> {
    let bits = u128::from_be_bytes(address.octets());
    (0..=128u32).rev().find_map(|length| {
        let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
        map.get(&Prefix { length, address: Addr::v6((bits & mask).to_be_bytes()) }).copied()
    })
}

impl Policy for Compiled {
    fn endpoint(&self, ifindex: u32) -> Option<&Endpoint> {
        self.endpoints.get(&ifindex)
    }

    fn address(&self, address: &Addr) -> Option<&Address> {
        self.addresses.get(address)
    }

    fn prefix(&self, address: &Addr) -> Option<IdentityId> {
        longest(&self.prefixes, address)
    }

    fn table(&self, key: &SetKey) -> Option<TableId> {
        self.sets.get(key).copied()
    }

    fn decision(&self, key: &TableKey) -> Option<&Decision> {
        let [protocol, high, low, _] = key.port;
        let port = u16::from_be_bytes([high, low]);
        let of_protocol = (0..=16u32).rev().find_map(|bits| {
            let mask = u16::MAX.checked_shl(16 - bits).unwrap_or(0);
            let [high, low] = (port & mask).to_be_bytes();
            let key = TableKey { table: key.table, port: [protocol, high, low, 0] };
            self.tables.get(&TablePrefix { length: TableKey::ANY_PORT + bits, key })
        });
        let any = TableKey { table: key.table, port: [0; 4] };
        of_protocol.or_else(|| self.tables.get(&TablePrefix { length: TableKey::ANY_PROTOCOL, key: any }))
    }

    fn is_service(&self, key: &ServiceKey) -> bool {
        self.services.contains_key(key)
    }

    fn range(&self, address: &Addr) -> Option<u32> {
        longest(&self.ranges, address)
    }
}

impl Maps for Simulation {
    type Policy = Compiled;
    type Conn = Rc<Connection>;

    fn policy(&self) -> &Compiled {
        &self.compiled
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn revision(&self) -> u32 {
        self.revision
    }

    fn connection(&self, key: &ConnKey) -> Option<Rc<Connection>> {
        self.connections.borrow().get(key).cloned()
    }

    fn track(&self, key: &ConnKey, connection: &Connection) {
        self.connections.borrow_mut().insert(*key, Rc::new(connection.clone()));
    }

    fn fragment(&self, key: &FragmentKey) -> Option<u64> {
        self.fragments.borrow().get(key).copied()
    }

    fn note_fragment(&self, key: &FragmentKey, now: u64) {
        self.fragments.borrow_mut().insert(*key, now);
    }
}
