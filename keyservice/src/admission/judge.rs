//! The order of an admission: keys, then prefixes, then addresses, then what to remember.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::contest::{Bid, Outcome, Standing, Tenure, contest};
use super::party::{Party, gather, in_pools, is_host, outermost};
use super::{Admission, Admitted, Claim, Incumbent, Incumbents, Refusal, Rules, reason};
use crate::key::PublicKey;

struct Judge<'a> {
    parties: Vec<Party<'a>>,
    rules: &'a Rules<'a>,
    refused: Vec<Refusal>,
    notices: Vec<Refusal>,
    /// Parties whose keys or prefixes were all lost to others.
    beaten: BTreeSet<usize>,
}

pub(super) fn judge(claims: &[Claim], incumbents: &Incumbents, rules: &Rules<'_>) -> Admission {
    let mut refused = Vec::new();
    let parties = gather(claims, incumbents, rules, &mut refused);
    let mut judge = Judge { parties, rules, refused, notices: Vec::new(), beaten: BTreeSet::new() };
    judge.keys();
    judge.prefixes();
    judge.addresses();
    judge.decide()
}

impl Judge<'_> {
    fn keys(&mut self) {
        let mut bids: Vec<Bid<PublicKey>> = Vec::new();
        for (party, p) in self.parties.iter().enumerate() {
            let mut bid = |item: PublicKey, tenure, whole| {
                bids.push(Bid { party, item, standing: Standing { backed: false, tenure }, whole });
            };
            if p.own {
                self.rules.own_keys.iter().for_each(|key| bid(*key, Tenure::Own, false));
            } else if p.live {
                for key in p.keys.iter().map(|key| key.public_key) {
                    bid(key, p.tenure(|memory| memory.keys.contains(&key)), p.memory.is_none());
                }
            } else if let Some(memory) = p.memory {
                memory.keys.iter().for_each(|key| bid(*key, Tenure::Holder, false));
            }
        }
        let outcomes = contest(&bids);
        let won: BTreeSet<(usize, PublicKey)> = winners(&bids, &outcomes).collect();
        self.report(&bids, &outcomes, "key", reason::DUPLICATE_KEY);
        for (index, party) in self.parties.iter_mut().enumerate() {
            party.keys.retain(|key| won.contains(&(index, key.public_key)));
        }
    }

    fn prefixes(&mut self) {
        let mut bids: Vec<Bid<IpNet>> = Vec::new();
        for (party, p) in self.parties.iter().enumerate() {
            let remembered = || p.memory.map(|memory| memory.pod_cidrs.clone()).unwrap_or_default();
            let (backed, items) = if p.live {
                (p.backed(), p.prefixes.clone())
            } else if let Some(authority) = p.authority.filter(|_| p.backed()) {
                let mut items = outermost(&authority.pod_cidrs);
                items.retain(|prefix| in_pools(prefix, self.rules.pools));
                (true, items)
            } else {
                // Unseen so far: its Node object may yet back what is remembered.
                (p.authority.is_none(), remembered())
            };
            for item in items {
                let tenure = p.tenure(|memory| memory.pod_cidrs.iter().any(|held| held.contains(&item)));
                // What an authority names is not free for announcements even when its node is refused.
                let whole = p.live && p.memory.is_none() && !backed;
                bids.push(Bid { party, item, standing: Standing { backed, tenure }, whole });
            }
        }
        let outcomes = contest(&bids);
        let won: BTreeSet<(usize, IpNet)> = winners(&bids, &outcomes).collect();
        self.report(&bids, &outcomes, "prefix", reason::OVERLAPPING_PREFIX);
        for (index, party) in self.parties.iter_mut().enumerate() {
            party.prefixes.retain(|prefix| party.live && won.contains(&(index, *prefix)));
        }
    }

    fn addresses(&mut self) {
        let mut bids: Vec<Bid<IpAddr>> = Vec::new();
        for (party, p) in self.parties.iter().enumerate() {
            let items = match (p.authority, p.memory) {
                (None, Some(memory)) => memory.addresses.clone(),
                _ => p.addresses.clone(),
            };
            let items: BTreeSet<IpAddr> = items.into_iter().collect();
            for item in items {
                if let Some((reason, problem)) = self.misplaced(&item) {
                    if p.live {
                        self.notices.push(p.refusal(reason, format!("address {item} {problem}")));
                    }
                    continue;
                }
                let tenure = match p.tenure(|memory| memory.addresses.contains(&item)) {
                    _ if p.own => Tenure::Own,
                    Tenure::Holder => Tenure::Holder,
                    _ => Tenure::Newcomer,
                };
                bids.push(Bid { party, item, standing: Standing { backed: true, tenure }, whole: false });
            }
        }
        let outcomes = contest(&bids);
        let won: BTreeSet<(usize, IpAddr)> = winners(&bids, &outcomes).collect();
        for (bid, outcome) in bids.iter().zip(&outcomes) {
            let party = &self.parties[bid.party];
            if party.live
                && let Some(message) = self.complaint("address", bid, outcome)
            {
                self.notices.push(party.refusal(reason::DUPLICATE_ADDRESS, message));
            }
        }
        for (index, party) in self.parties.iter_mut().enumerate() {
            let mut seen = BTreeSet::new();
            party.addresses.retain(|address| won.contains(&(index, *address)) && seen.insert(*address));
        }
    }

    fn misplaced(&self, address: &IpAddr) -> Option<(&'static str, &'static str)> {
        if !is_host(address) {
            return Some((reason::INVALID_ADDRESS, "is not that of one host"));
        }
        let in_pool = self.rules.pools.iter().any(|pool| pool.contains(address));
        in_pool.then_some((reason::ADDRESS_IN_POOL, "is inside the cluster's pools, where only pods are"))
    }

    /// Refuses parties that lost all they asked for, and all newcomers that lost anything; the others get
    /// a notice for each loss.
    fn report<T: Display + Copy>(
        &mut self,
        bids: &[Bid<T>],
        outcomes: &[Outcome],
        what: &str,
        reason: &'static str,
    ) {
        let kept: BTreeSet<usize> = winners(bids, outcomes).map(|(party, _)| party).collect();
        let mut complaints: Vec<(usize, bool, Refusal)> = Vec::new();
        for (bid, outcome) in bids.iter().zip(outcomes) {
            let party = &self.parties[bid.party];
            if party.live
                && let Some(message) = self.complaint(what, bid, outcome)
            {
                let out = party.memory.is_none() || !kept.contains(&bid.party);
                complaints.push((bid.party, out, party.refusal(reason, message)));
            }
        }
        for (party, out, complaint) in complaints {
            if !out {
                self.notices.push(complaint);
            } else if self.beaten.insert(party) {
                self.refused.push(complaint);
                self.parties[party].live = false;
            }
        }
    }

    fn complaint<T: Display>(&self, what: &str, bid: &Bid<T>, outcome: &Outcome) -> Option<String> {
        let name = |party: &usize| self.parties[*party].name;
        match outcome {
            Outcome::Won | Outcome::Forfeited => None,
            Outcome::Lost(to) => Some(format!("{what} {} belongs to node {}", bid.item, name(to))),
            Outcome::Tied(with) => {
                let with = name(with);
                Some(format!(
                    "{what} {} is also claimed by node {with}, and nothing says whose it is",
                    bid.item
                ))
            }
        }
    }

    fn decide(mut self) -> Admission {
        let mut admission = Admission { incumbents: self.remember(), ..Admission::default() };
        for index in 0..self.parties.len() {
            if self.parties[index].own && self.parties[index].authority.is_some() {
                admission.own = Some(self.admitted(index));
            } else if self.parties[index].live {
                let admitted = self.admitted(index);
                admission.admitted.push(admitted);
            }
        }
        let names: BTreeSet<&str> = self.parties.iter().filter(|p| p.live).map(|p| p.name).collect();
        self.notices.retain(|notice| names.contains(notice.name.as_str()));
        self.refused.sort();
        self.notices.sort();
        Admission { refused: self.refused, notices: self.notices, ..admission }
    }

    fn admitted(&mut self, index: usize) -> Admitted {
        let party = &self.parties[index];
        let mut endpoints: Vec<SocketAddr> =
            party.claim.map(|claim| claim.announcement.endpoints.clone()).unwrap_or_default();
        // The ports are the first key's; when that key was contested away, the other's must do.
        let claimed =
            party.claim.and_then(|claim| claim.announcement.keys.iter().max_by_key(|key| key.epoch));
        if let (Some(claimed), Some(first)) = (claimed, party.keys.first()) {
            for endpoint in endpoints.iter_mut().filter(|endpoint| endpoint.port() == claimed.port) {
                endpoint.set_port(first.port);
            }
        }
        let in_pool =
            |endpoint: &SocketAddr| self.rules.pools.iter().any(|pool| pool.contains(&endpoint.ip()));
        for endpoint in endpoints.iter().filter(|endpoint| in_pool(endpoint)) {
            // Its packets would be routed into the tunnel they are to carry.
            let message = format!("endpoint {endpoint} is inside the cluster's pools, where only pods are");
            self.notices.push(party.refusal(reason::ADDRESS_IN_POOL, message));
        }
        endpoints.retain(|endpoint| !in_pool(endpoint));
        Admitted {
            name: party.name.to_owned(),
            keys: party.keys.clone(),
            pod_cidrs: party.prefixes.clone(),
            endpoints,
            addresses: party.addresses.clone(),
        }
    }

    /// What each party got, or what it held and nobody else got.
    fn remember(&self) -> Incumbents {
        let live = || self.parties.iter().filter(|party| party.live);
        let keys: BTreeSet<PublicKey> = live().flat_map(|p| self.keys_of(p)).collect();
        let mut prefixes: Vec<IpNet> = live().flat_map(|p| p.prefixes.iter().copied()).collect();
        prefixes.sort_by_key(|prefix| prefix.network());
        let addresses: BTreeSet<IpAddr> = live().flat_map(|p| p.addresses.iter().copied()).collect();
        let mut incumbents = Incumbents::default();
        for party in &self.parties {
            let incumbent =
                if party.live {
                    let uid = party.authority.and_then(|authority| authority.uid.clone());
                    Incumbent {
                        uid: uid.or_else(|| party.memory.and_then(|memory| memory.uid.clone())),
                        keys: self.keys_of(party),
                        pod_cidrs: party.prefixes.clone(),
                        addresses: party.addresses.clone(),
                        announcement_key: match self.rules.first_use {
                            Some(_) => party.claim.and_then(|claim| claim.signer),
                            None => party.memory.and_then(|memory| memory.announcement_key),
                        },
                    }
                } else if let Some(memory) = party.memory {
                    let mut kept = memory.clone();
                    kept.keys.retain(|key| !keys.contains(key));
                    // Of a prefix that is partly somebody's now, what its own authority names stays its own.
                    let named =
                        party.authority.map(|authority| outermost(&authority.pod_cidrs)).unwrap_or_default();
                    let parts = memory.pod_cidrs.iter().filter(|held| overlaps_any(held, &prefixes));
                    kept.pod_cidrs.extend(parts.flat_map(|held| {
                        named.iter().filter(move |part| held.contains(*part) && *part != held)
                    }));
                    kept.pod_cidrs.retain(|held| !overlaps_any(held, &prefixes));
                    kept.addresses.retain(|address| !addresses.contains(address));
                    kept
                } else {
                    continue;
                };
            incumbents.0.insert(party.name.to_owned(), incumbent);
        }
        incumbents
    }

    fn keys_of(&self, party: &Party<'_>) -> Vec<PublicKey> {
        if party.own {
            return self.rules.own_keys.to_vec();
        }
        party.keys.iter().map(|key| key.public_key).collect()
    }
}

fn winners<T: Copy>(bids: &[Bid<T>], outcomes: &[Outcome]) -> impl Iterator<Item = (usize, T)> {
    let won = bids.iter().zip(outcomes).filter(|(_, outcome)| **outcome == Outcome::Won);
    won.map(|(bid, _)| (bid.party, bid.item))
}

/// `sorted` are disjoint, so only the neighbours of where `prefix` begins can overlap it.
fn overlaps_any(prefix: &IpNet, sorted: &[IpNet]) -> bool {
    let after = sorted.partition_point(|other| other.network() <= prefix.network());
    let before = after.checked_sub(1).and_then(|i| sorted.get(i));
    let contains = |other: &IpNet| other.contains(prefix) || prefix.contains(other);
    before.is_some_and(contains) || sorted.get(after).is_some_and(contains)
}
