//! The programs and maps in the kernel: load or adopt, attach, apply, observe, take away.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, RingBuf};
use aya::programs::{SchedClassifier, SkLookup, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use margay_bpf::layout::{Addr, Config, Count, CounterKey, Decision, LAYOUT_VERSION, Reason, TableKey};
use nix::net::if_::{if_indextoname, if_nametoindex};

use crate::apply::{ApplyReport, State};
use crate::attach;
use crate::compile::Compiled;
use crate::error::Error;
use crate::events::{Counter, Events, seen_from_pod};
use crate::maps::Mirror;
use crate::object;
use crate::pins::Pins;

/// Where programs are attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// TCX where the kernel has it (6.6 and newer), else clsact.
    #[default]
    Auto,
    /// TCX links only.
    Tcx,
    /// A clsact qdisc with direct-action filters.
    Clsact,
}

/// How to open the enforcer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Directory on a bpffs for pins; made with mode 0700.
    pub pin_dir: PathBuf,
    /// How programs are attached.
    pub attach: AttachMode,
    /// What to do with pinned maps of another layout: refuse (false), or make new ones. Every attached pod is then closed until
    /// the first apply, and its connections are judged as new.
    pub replace_incompatible: bool,
}

impl Options {
    /// Pins under `pin_dir`, everything else by default.
    pub fn new(pin_dir: impl Into<PathBuf>) -> Self {
        Self { pin_dir: pin_dir.into(), attach: AttachMode::Auto, replace_incompatible: false }
    }
}

/// A device that our programs are attached to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attached {
    /// Index of the device.
    pub ifindex: u32,
    /// Its present name.
    pub ifname: String,
    /// What it is to policy.
    pub role: Role,
}

/// What a device is to policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A pod's host-side veth.
    Pod,
    /// The tunnel device.
    Tunnel,
    /// Any other device that packets from pods may leave by.
    Exit(Framing),
}

/// What stands before the IP header of a device's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Framing {
    /// An Ethernet header.
    Ethernet,
    /// Nothing.
    Ip,
}

impl Role {
    const ALL: [Self; 4] = [Self::Pod, Self::Tunnel, Self::Exit(Framing::Ethernet), Self::Exit(Framing::Ip)];

    /// The programs such a device carries. The tunnel comes before a mere exit without headers, since it has all that one has.
    const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Pod => &["pod_egress", "pod_ingress"],
            Self::Tunnel => &["tunnel_ingress", "exit_ip"],
            Self::Exit(Framing::Ethernet) => &["exit_ethernet"],
            Self::Exit(Framing::Ip) => &["exit_ip"],
        }
    }
}

/// The programs and maps of this node. Dropping it changes nothing in the kernel.
pub struct Enforcer {
    pins: Pins,
    attach: AttachMode,
    adopted: bool,
    programs: Ebpf,
    state: State,
    counters: PerCpuHashMap<MapData, CounterKey, Count>,
    lost: PerCpuArray<MapData, u64>,
    /// The names behind ids, as last applied.
    names: crate::compile::Names,
}

impl std::fmt::Debug for Enforcer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enforcer")
            .field("pins", &self.pins)
            .field("adopted", &self.adopted)
            .finish_non_exhaustive()
    }
}

/// `linux/pkt_cls.h`.
const TC_ACT_SHOT: u32 = 2;

impl Enforcer {
    /// Loads programs and maps and pins them, or adopts what an earlier agent pinned: its maps, with all connections, and its
    /// attachments, on each of which our program takes the old one's place in one step.
    ///
    /// # Errors
    /// Whatever fails before the programs are swapped leaves the earlier enforcement untouched.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let pins = Pins::open(&options.pin_dir)?;
        let object = object::bytes()?;
        let wanted = object::maps(&object)?;
        let adopted = match pins.check(&wanted).and_then(|found| Ok(found && layout_is_ours(&pins)?)) {
            Err(Error::Incompatible { .. }) if options.replace_incompatible => false,
            other => other?,
        };
        let dir = if adopted { pins.maps() } else { pins.staging()? };
        let mut programs = load(&object, wanted.keys().map(|name| (name.as_str(), dir.join(name))))?;
        let mut state = open_state(&mut programs)?;
        if !adopted {
            state.config.put(0, Config { layout: LAYOUT_VERSION, revision: 1 })?;
        }
        let mut enforcer = Self {
            counters: take(&mut programs, "COUNTERS")?,
            lost: take(&mut programs, "EVENTS_LOST")?,
            attach: options.attach,
            names: crate::compile::Names::default(),
            pins,
            adopted,
            programs,
            state,
        };
        // With new maps no endpoint is known yet: from here on, what was attached is closed.
        for attachment in enforcer.pins.attachments()? {
            let program = program(&mut enforcer.programs, attachment.program)?;
            attach::replace(&enforcer.pins, program, &attachment)?;
        }
        attach::host(&enforcer.pins, host_program(&mut enforcer.programs)?)?;
        if !adopted {
            enforcer.pins.publish(&dir)?;
        }
        Ok(enforcer)
    }

    /// Whether maps of an earlier agent were adopted.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// Attaches both directions to a pod's host-side veth. Until [`Self::apply`] knows the endpoint, it is closed.
    pub fn attach_pod(&mut self, ifname: &str) -> Result<(), Error> {
        self.attach(ifname, Role::Pod)
    }

    /// Attaches to the tunnel device the check of sources, and the judgement of what pods send to Services.
    pub fn attach_tunnel(&mut self, ifname: &str) -> Result<(), Error> {
        self.attach(ifname, Role::Tunnel)
    }

    /// Attaches to a device the programs of its role.
    pub fn attach(&mut self, ifname: &str, role: Role) -> Result<(), Error> {
        let ifindex = if_nametoindex(ifname)
            .map_err(|errno| Error::Device { ifname: ifname.to_owned(), source: errno.into() })?;
        for name in role.programs() {
            let program = program(&mut self.programs, name)?;
            attach::attach(&self.pins, self.attach, program, name, ifname, ifindex)?;
        }
        Ok(())
    }

    /// Takes our programs from a device; absent is success.
    pub fn detach(&mut self, ifname: &str) -> Result<(), Error> {
        let Ok(ifindex) = if_nametoindex(ifname) else { return self.forget_vanished() };
        for attachment in self.pins.attachments()?.iter().filter(|of| of.ifindex == ifindex) {
            attach::detach(&self.pins, attachment)?;
        }
        self.forget_counters(ifindex)
    }

    /// Removes the pins of devices that have gone.
    pub fn forget_vanished(&mut self) -> Result<(), Error> {
        for attachment in self.pins.attachments()? {
            if ifname(attachment.ifindex).is_none() {
                attach::detach(&self.pins, &attachment)?;
                self.forget_counters(attachment.ifindex)?;
            }
        }
        Ok(())
    }

    /// Devices that carry our programs, whoever attached them. A device has a role once all programs of it are attached.
    pub fn attached(&self) -> Result<Vec<Attached>, Error> {
        let mut devices: BTreeMap<u32, Vec<&'static str>> = BTreeMap::new();
        for of in self.pins.attachments()? {
            devices.entry(of.ifindex).or_default().push(of.program);
        }
        let attached = devices.into_iter().filter_map(|(ifindex, programs)| {
            let has_all = |role: &Role| role.programs().iter().all(|name| programs.contains(name));
            let role = Role::ALL.into_iter().find(has_all)?;
            Some(Attached { ifindex, ifname: ifname(ifindex)?, role })
        });
        Ok(attached.collect())
    }

    /// Makes the maps hold exactly what was compiled, such that nothing is open in between.
    ///
    /// # Errors
    /// [`Error::Closed`]: endpoints are closed rather than left with half a policy.
    pub fn apply(&mut self, compiled: &Compiled) -> Result<ApplyReport, Error> {
        let report = self.state.apply(compiled)?;
        let gone = self.names.pods.keys().filter(|ifindex| !compiled.endpoints.contains_key(ifindex));
        for ifindex in gone.copied().collect::<Vec<_>>() {
            self.forget_counters(ifindex)?;
        }
        self.names = compiled.names.clone();
        Ok(report)
    }

    /// The stream of denied packets. One reader at a time: two would share the events between them.
    pub fn events(&self) -> Result<Events, Error> {
        let failed = |source| Error::map("open", "EVENTS", source);
        let data = MapData::from_pin(self.pins.map("EVENTS")).map_err(failed)?;
        let map = Map::from_map_data(data).map_err(failed)?;
        Ok(Events { buffer: RingBuf::try_from(map).map_err(failed)? })
    }

    /// Denied packets that the event buffer had no room for, since the maps were made.
    pub fn events_lost(&self) -> Result<u64, Error> {
        let values = self.lost.get(&0, 0).map_err(|source| Error::map("read", "EVENTS_LOST", source))?;
        Ok(values.iter().sum())
    }

    /// Counters of every endpoint.
    pub fn counters(&self) -> Result<Vec<Counter>, Error> {
        let mut list = Vec::new();
        for entry in self.counters.iter() {
            let (key, values) = match entry {
                Ok(entry) => entry,
                // Removed while we were reading.
                Err(MapError::KeyNotFound) => continue,
                Err(source) => return Err(Error::map("read", "COUNTERS", source)),
            };
            let Some(reason) = Reason::from_u8(key.reason) else { continue };
            list.push(Counter {
                ifindex: key.ifindex,
                pod: self.names.pods.get(&key.ifindex).cloned(),
                direction: seen_from_pod(key.direction),
                allowed: reason.allows(),
                reason: reason.name(),
                packets: values.iter().map(|count| count.packets).sum(),
                bytes: values.iter().map(|count| count.bytes).sum(),
            });
        }
        list.sort_by_key(|counter| (counter.ifindex, counter.direction, counter.reason));
        Ok(list)
    }

    /// Runs one of our programs on a packet by `BPF_PROG_TEST_RUN`, as if it stood at device `ifindex` and had come in through
    /// device `input`. True if it passes.
    pub fn test_run(
        &mut self,
        name: &'static str,
        ifindex: u32,
        input: u32,
        packet: &[u8],
    ) -> Result<bool, Error> {
        // struct __sk_buff up to ifindex; the kernel takes the rest as zero.
        let mut context = [0; 44];
        context[36..40].copy_from_slice(&input.to_ne_bytes());
        context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
        let options =
            TestRunOptions { data_in: Some(packet), ctx_in: Some(&context), ..TestRunOptions::new() };
        let result = program(&mut self.programs, name)?
            .test_run(options)
            .map_err(|source| Error::Program { program: name, source: Box::new(source) })?;
        Ok(result.return_value != TC_ACT_SHOT)
    }

    fn forget_counters(&mut self, ifindex: u32) -> Result<(), Error> {
        let failed = |source| Error::map("clear", "COUNTERS", source);
        let keys: Vec<_> =
            self.counters.keys().filter_map(Result::ok).filter(|key| key.ifindex == ifindex).collect();
        for key in keys {
            match self.counters.remove(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
                }
                Err(source) => return Err(failed(source)),
            }
        }
        Ok(())
    }

    /// Detaches everything and removes every pin and the directory itself; absent is success.
    pub fn cleanup(pin_dir: &Path) -> Result<(), Error> {
        if !pin_dir.try_exists().map_err(|source| Error::io("look for", pin_dir, source))? {
            return Ok(());
        }
        let pins = Pins::open(pin_dir)?;
        for attachment in pins.attachments()? {
            attach::detach(&pins, &attachment)?;
        }
        pins.remove()
    }
}

fn load<'a>(object: &[u8], pins: impl Iterator<Item = (&'a str, PathBuf)>) -> Result<Ebpf, Error> {
    let mut loader = EbpfLoader::new();
    for (name, path) in pins {
        loader.map_pin_path(name, path);
    }
    let mut ebpf = loader.load(object).map_err(|source| Error::Load(Box::new(source)))?;
    for name in object::PROGRAMS {
        program(&mut ebpf, name)?
            .load()
            .map_err(|source| Error::Program { program: name, source: Box::new(source) })?;
    }
    host_program(&mut ebpf)?
        .load()
        .map_err(|source| Error::Program { program: object::HOST, source: Box::new(source) })?;
    Ok(ebpf)
}

fn host_program(ebpf: &mut Ebpf) -> Result<&mut SkLookup, Error> {
    ebpf.program_mut(object::HOST)
        .ok_or_else(|| Error::Object(format!("no program {}", object::HOST)))?
        .try_into()
        .map_err(|source| Error::Program { program: object::HOST, source: Box::new(source) })
}

pub(crate) fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, Error> {
    ebpf.program_mut(name)
        .ok_or_else(|| Error::Object(format!("no program {name}")))?
        .try_into()
        .map_err(|source| Error::Program { program: name, source: Box::new(source) })
}

fn take<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, Error> {
    let map = ebpf.take_map(name).ok_or_else(|| Error::Object(format!("no map {name}")))?;
    T::try_from(map).map_err(|source| Error::map("open", name, source))
}

fn open_state(ebpf: &mut Ebpf) -> Result<State, Error> {
    Ok(State {
        config: Mirror::open("CONFIG", take::<Array<_, _>>(ebpf, "CONFIG")?)?,
        endpoints: Mirror::open("ENDPOINTS", take::<HashMap<_, _, _>>(ebpf, "ENDPOINTS")?)?,
        addresses: Mirror::open("ADDRESSES", take::<HashMap<_, _, _>>(ebpf, "ADDRESSES")?)?,
        prefixes: Mirror::open("PREFIXES", take::<LpmTrie<_, Addr, _>>(ebpf, "PREFIXES")?)?,
        sets: Mirror::open("SETS", take::<HashMap<_, _, _>>(ebpf, "SETS")?)?,
        tables: Mirror::open("TABLES", take::<LpmTrie<_, TableKey, Decision>>(ebpf, "TABLES")?)?,
        services: Mirror::open("SERVICES", take::<HashMap<_, _, _>>(ebpf, "SERVICES")?)?,
        ranges: Mirror::open("RANGES", take::<LpmTrie<_, Addr, _>>(ebpf, "RANGES")?)?,
        unsettled: true,
    })
}

/// Whether the pinned maps' contents have our meaning, not only their shape.
fn layout_is_ours(pins: &Pins) -> Result<bool, Error> {
    let failed = |source| Error::map("read", "CONFIG", source);
    let path = pins.map("CONFIG");
    let map = Map::from_map_data(MapData::from_pin(&path).map_err(failed)?).map_err(failed)?;
    let config = Array::<_, Config>::try_from(map).map_err(failed)?.get(&0, 0).map_err(failed)?;
    if config.layout == LAYOUT_VERSION {
        return Ok(true);
    }
    Err(Error::Incompatible {
        path,
        field: "layout version",
        found: config.layout.into(),
        wanted: LAYOUT_VERSION.into(),
    })
}

/// The name of a device, if it exists.
pub(crate) fn ifname(ifindex: u32) -> Option<String> {
    match if_indextoname(ifindex) {
        Ok(name) => name.into_string().ok(),
        Err(errno) => {
            let error: io::Error = errno.into();
            tracing::debug!(ifindex, %error, "device has gone");
            None
        }
    }
}
