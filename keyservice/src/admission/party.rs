//! Everyone with a stake in an admission, by name, with what each asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::contest::Tenure;
use super::{Authority, Claim, Incumbent, Incumbents, Refusal, Rules, reason};
use crate::announcement::{KeyClaim, MAX_KEYS};
use crate::key::PublicKey;

/// A Node with a claim, with an authority, with a memory of it, or all of them.
pub(super) struct Party<'a> {
    pub(super) name: &'a str,
    /// This node.
    pub(super) own: bool,
    /// The claim under its name that counts.
    pub(super) claim: Option<&'a Claim>,
    /// `None` while its Node object was not seen.
    pub(super) authority: Option<&'a Authority>,
    /// `None` for newcomers.
    pub(super) memory: Option<&'a Incumbent>,
    /// Still on its way to be admitted. The others only defend what they hold.
    pub(super) live: bool,
    /// What it asks for, and after the contests what it got.
    pub(super) keys: Vec<KeyClaim>,
    pub(super) prefixes: Vec<IpNet>,
    pub(super) addresses: Vec<IpAddr>,
}

/// Collects the parties in name order. Claims that are wrong in themselves are refused right here.
pub(super) fn gather<'a>(
    claims: &'a [Claim],
    incumbents: &'a Incumbents,
    rules: &'a Rules<'_>,
    refused: &mut Vec<Refusal>,
) -> Vec<Party<'a>> {
    let mut by_name: BTreeMap<&str, Vec<&Claim>> = BTreeMap::new();
    for claim in claims {
        let same = by_name.entry(&claim.announcement.name).or_default();
        if !same.contains(&claim) {
            same.push(claim);
        }
    }
    let mut names: BTreeSet<&str> = by_name.keys().copied().collect();
    names.extend(rules.silent.keys().map(String::as_str));
    names.insert(rules.own_name);
    if !rules.synced {
        names.extend(incumbents.0.keys().map(String::as_str));
    }
    names
        .into_iter()
        .map(|name| {
            let claims = by_name.remove(name).unwrap_or_default();
            Party::new(name, claims, incumbents.0.get(name), rules, refused)
        })
        .collect()
}

impl<'a> Party<'a> {
    fn new(
        name: &'a str,
        mut claims: Vec<&'a Claim>,
        memory: Option<&'a Incumbent>,
        rules: &'a Rules<'_>,
        refused: &mut Vec<Refusal>,
    ) -> Self {
        let own = name == rules.own_name;
        if claims.len() > 1 {
            // Only to be independent of the order they came in.
            claims.sort_by_cached_key(|claim| format!("{claim:?}"));
        }
        let claim = if own { own_claim(&claims, rules) } else { best_claim(&claims, memory) };
        for other in claims.iter().filter(|other| claim.is_none_or(|chosen| chosen != **other)) {
            // Of this node's own claims the first counts, and the others are no harm.
            if !(own && is_own(other, rules)) {
                refused.push(Refusal {
                    name: name.to_owned(),
                    reason: reason::NAME_TAKEN,
                    message: taken(own, other),
                });
            }
        }
        let authority = claim.or(claims.first().copied()).map(|c| &c.authority).or(rules.silent.get(name));
        // Only this node itself is a party without a Node object once all are known.
        let gone = rules.synced && authority.is_none();
        let memory = memory.filter(|memory| !gone && !rebuilt(memory, authority));
        let mut party = Self {
            name,
            own,
            claim,
            authority,
            memory,
            live: own && authority.is_some(),
            keys: claim.map(|claim| claim.announcement.keys.clone()).unwrap_or_default(),
            prefixes: wished_prefixes(claim, authority),
            addresses: authority.map(|authority| authority.addresses.clone()).unwrap_or_default(),
        };
        party.keys.sort_by_key(|key| std::cmp::Reverse((key.epoch, key.public_key)));
        if own {
            if let Some(message) = foreign(&party.prefixes, rules.pools) {
                refused.push(party.refusal(reason::FOREIGN_PREFIX, message));
                party.prefixes.clear();
                party.live = false;
            }
        } else if claim.is_some() {
            match party.fault(rules) {
                Some((reason, message)) => refused.push(party.refusal(reason, message)),
                None => party.live = true,
            }
        }
        party
    }

    pub(super) fn refusal(&self, reason: &'static str, message: String) -> Refusal {
        Refusal { name: self.name.to_owned(), reason, message }
    }

    /// What is wrong with the claim whatever the others say.
    fn fault(&self, rules: &Rules<'_>) -> Option<(&'static str, String)> {
        self.distrusted(rules).or_else(|| self.unusable(rules))
    }

    /// Whether the announcement is not from who was first heard under this Node's UID.
    fn distrusted(&self, rules: &Rules<'_>) -> Option<(&'static str, String)> {
        let trusted = rules.first_use?;
        let Some(signer) = self.claim.and_then(|claim| claim.signer) else {
            return Some((reason::UNSIGNED, "the announcement is not signed for this Node".to_owned()));
        };
        let pinned = self.memory.and_then(|memory| memory.announcement_key)?;
        if signer == pinned || trusted.get(self.name) == Some(&signer) {
            return None;
        }
        let message = format!(
            "the announcement is signed with key {signer}, and this Node's first one was with {pinned}: if that is right, \
             meshctl nodes trust {}",
            self.name
        );
        Some((reason::KEY_CHANGED, message))
    }

    fn unusable(&self, rules: &Rules<'_>) -> Option<(&'static str, String)> {
        let distinct: BTreeSet<PublicKey> = self.keys.iter().map(|key| key.public_key).collect();
        if self.keys.is_empty() || self.keys.len() > MAX_KEYS || distinct.len() < self.keys.len() {
            let message = format!(
                "claims {} keys of which {} differ, not 1 to {MAX_KEYS}",
                self.keys.len(),
                distinct.len()
            );
            return Some((reason::INVALID_KEYS, message));
        }
        if let Some(key) = distinct.iter().find(|key| key.is_low_order()) {
            return Some((
                reason::LOW_ORDER_KEY,
                format!("key {key} is of low order: every secret made with it is known"),
            ));
        }
        if let Some(key) = distinct.iter().find(|key| rules.own_keys.contains(key)) {
            return Some((
                reason::DUPLICATE_KEY,
                format!("key {key} is this node's own ({})", rules.own_name),
            ));
        }
        foreign(&self.prefixes, rules.pools).map(|message| (reason::FOREIGN_PREFIX, message))
    }

    /// The prefixes come from the Node object and not from the announcement.
    pub(super) fn backed(&self) -> bool {
        self.authority.is_some_and(|authority| !authority.pod_cidrs.is_empty())
    }

    pub(super) fn tenure(&self, holds: impl Fn(&Incumbent) -> bool) -> Tenure {
        match self.memory {
            Some(memory) if holds(memory) => Tenure::Holder,
            Some(_) => Tenure::Known,
            None => Tenure::Newcomer,
        }
    }
}

fn is_own(claim: &Claim, rules: &Rules<'_>) -> bool {
    let keys = &claim.announcement.keys;
    !keys.is_empty() && keys.iter().all(|key| rules.own_keys.contains(&key.public_key))
}

fn own_claim<'a>(claims: &[&'a Claim], rules: &Rules<'_>) -> Option<&'a Claim> {
    claims.iter().copied().find(|claim| is_own(claim, rules))
}

/// The only claim, or the one that looks most like what is remembered; sources yield one a name.
fn best_claim<'a>(claims: &[&'a Claim], memory: Option<&Incumbent>) -> Option<&'a Claim> {
    if let [only] = claims {
        return Some(only);
    }
    let memory = memory?;
    let held = &memory.keys;
    let likeness = |claim: &Claim| {
        let keys = &claim.announcement.keys;
        let shared = keys.iter().filter(|key| held.contains(&key.public_key)).count();
        let shared = if rebuilt(memory, Some(&claim.authority)) { 0 } else { shared };
        (shared, std::cmp::Reverse(keys.len().saturating_sub(shared)))
    };
    let best = claims.iter().map(|claim| likeness(claim)).max().filter(|best| best.0 > 0)?;
    let mut like = claims.iter().copied().filter(|claim| likeness(claim) == best);
    like.next().filter(|_| like.next().is_none())
}

fn taken(own: bool, claim: &Claim) -> String {
    let keys: Vec<String> = claim.announcement.keys.iter().map(|key| key.public_key.to_string()).collect();
    let keys = keys.join(" and ");
    if own {
        format!("announces this node's own name with key {keys}, which is not this node's")
    } else {
        format!("is claimed several times at once; the claim with key {keys} is not believed")
    }
}

fn rebuilt(memory: &Incumbent, authority: Option<&Authority>) -> bool {
    let now = authority.and_then(|authority| authority.uid.as_ref());
    now.is_some() && memory.uid.is_some() && now != memory.uid.as_ref()
}

fn wished_prefixes(claim: Option<&Claim>, authority: Option<&Authority>) -> Vec<IpNet> {
    let named = authority.map(|authority| authority.pod_cidrs.as_slice()).unwrap_or_default();
    let announced = claim.map(|claim| claim.announcement.pod_cidrs.as_slice()).unwrap_or_default();
    outermost(if named.is_empty() { announced } else { named })
}

/// Without host bits, in order, without those inside another.
pub(super) fn outermost(prefixes: &[IpNet]) -> Vec<IpNet> {
    let mut sorted: Vec<IpNet> = prefixes.iter().map(IpNet::trunc).collect();
    sorted.sort_by_key(|prefix| (prefix.network(), prefix.prefix_len()));
    let mut kept: Vec<IpNet> = Vec::with_capacity(sorted.len());
    for prefix in sorted {
        if !kept.last().is_some_and(|last| last.contains(&prefix)) {
            kept.push(prefix);
        }
    }
    kept
}

pub(super) fn in_pools(prefix: &IpNet, pools: &[IpNet]) -> bool {
    pools.iter().any(|pool| pool.contains(prefix))
}

fn foreign(prefixes: &[IpNet], pools: &[IpNet]) -> Option<String> {
    let prefix = prefixes.iter().find(|prefix| !in_pools(prefix, pools))?;
    Some(format!("prefix {prefix} is outside every pool of the cluster"))
}

/// Whether `address` can be that of one host on a network.
pub(super) fn is_host(address: &IpAddr) -> bool {
    let special = address.is_unspecified() || address.is_loopback() || address.is_multicast();
    let zoned = match address {
        IpAddr::V4(v4) => *v4 == Ipv4Addr::BROADCAST,
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    !special && !zoned
}
