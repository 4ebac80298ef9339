//! What is wrong with a link, and what that means for one frame. Pure: the caller brings time and chance.

use std::collections::BTreeMap;
use std::time::Duration;

/// Conditions in one direction of a link.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Conditions {
    /// Largest IP packet the hop takes, bytes.
    pub mtu: Option<u32>,
    /// The hop sends no ICMP when a packet is too big for it.
    pub icmp_dead: bool,
    /// How long each frame takes.
    pub delay: Duration,
    /// Share of frames that vanish, 0 to 1.
    pub loss: f64,
    /// Share of frames that take [`Conditions::LATE`] longer, so that later ones overtake them, 0 to 1.
    pub reorder: f64,
    /// Nothing gets through.
    pub cut: bool,
}

impl Conditions {
    /// How much longer a re-ordered frame takes.
    pub const LATE: Duration = Duration::from_millis(10);
}

/// What becomes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Hand it over after this long.
    Deliver(Duration),
    /// It is lost.
    Lost,
    /// The link is cut.
    Cut,
    /// Too big for the hop, whose MTU is given.
    TooBig(u32),
}

/// What has become of the frames so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Handed over (or on their way).
    pub delivered: u64,
    /// Of these, held back so that others overtake them.
    pub reordered: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Lost because the link was cut.
    pub cut: u64,
    /// Too big for the hop.
    pub too_big: u64,
}

impl Conditions {
    /// Judges a frame that carries `ip_length` bytes of IP (none: ARP and such, never too big). `chance` gives
    /// numbers in 0..1.
    pub fn judge(&self, ip_length: Option<usize>, mut chance: impl FnMut() -> f64) -> Verdict {
        if self.cut {
            return Verdict::Cut;
        }
        if let (Some(mtu), Some(length)) = (self.mtu, ip_length)
            && length > mtu as usize
        {
            return Verdict::TooBig(mtu);
        }
        if self.loss > 0.0 && chance() < self.loss {
            return Verdict::Lost;
        }
        if self.reorder > 0.0 && chance() < self.reorder {
            return Verdict::Deliver(self.delay + Self::LATE);
        }
        Verdict::Deliver(self.delay)
    }
}

impl Counts {
    /// Adds one verdict.
    pub fn add(&mut self, verdict: Verdict, normal: Duration) {
        match verdict {
            Verdict::Deliver(after) => {
                self.delivered += 1;
                self.reordered += u64::from(after > normal);
            }
            Verdict::Lost => self.lost += 1,
            Verdict::Cut => self.cut += 1,
            Verdict::TooBig(_) => self.too_big += 1,
        }
    }
}

/// Conditions of every ordered pair of hosts.
#[derive(Debug, Clone, Default)]
pub struct Links {
    default: Conditions,
    pairs: BTreeMap<(String, String), Conditions>,
}

impl Links {
    /// Every link like this until told otherwise.
    pub fn new(default: Conditions) -> Self {
        Self { default, pairs: BTreeMap::new() }
    }

    /// From a to b.
    pub fn between(&self, a: &str, b: &str) -> Conditions {
        self.pairs.get(&(a.to_string(), b.to_string())).copied().unwrap_or(self.default)
    }

    /// From a to b, to be changed.
    pub fn between_mut(&mut self, a: &str, b: &str) -> &mut Conditions {
        self.pairs.entry((a.to_string(), b.to_string())).or_insert(self.default)
    }

    /// A kernel bridge would do.
    pub fn is_clean(&self) -> bool {
        let clean = Conditions::default();
        self.default == clean && self.pairs.values().all(|conditions| *conditions == clean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_link_delivers_at_once() {
        let judged = Conditions::default().judge(Some(1500), || 0.0);
        assert_eq!(judged, Verdict::Deliver(Duration::ZERO));
        assert!(Links::default().is_clean());
    }

    #[test]
    fn too_big_is_judged_on_the_ip_packet_and_before_chance() {
        let hop = Conditions { mtu: Some(1400), loss: 1.0, ..Default::default() };
        assert_eq!(hop.judge(Some(1401), || panic!("no chance needed")), Verdict::TooBig(1400));
        assert_eq!(hop.judge(Some(1400), || 0.5), Verdict::Lost);
        assert_eq!(hop.judge(None, || 0.5), Verdict::Lost);
    }

    #[test]
    fn a_cut_link_delivers_nothing_and_only_its_own_direction() {
        let mut links = Links::default();
        links.between_mut("a", "b").cut = true;
        assert_eq!(links.between("a", "b").judge(None, || 1.0), Verdict::Cut);
        assert_eq!(links.between("b", "a").judge(None, || 1.0), Verdict::Deliver(Duration::ZERO));
        assert!(!links.is_clean());
    }

    #[test]
    fn a_reordered_frame_comes_after_the_delay_of_the_others() {
        let hop = Conditions { reorder: 0.5, delay: Duration::from_millis(3), ..Default::default() };
        let mut counts = Counts::default();
        for chance in [0.4, 0.6] {
            counts.add(hop.judge(Some(100), || chance), hop.delay);
        }
        assert_eq!((counts.delivered, counts.reordered), (2, 1));
    }
}
