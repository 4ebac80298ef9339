//! Several nodes on one API server, with everything going wrong that can: answers lost, conflicts, agents that die
//! at any call, machines cut off, rebuilt, deleted and back, pools changed. No address is ever two machines'.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod world;

use std::net::IpAddr;
use std::time::Duration;

use mesh_ipam::IpamError;
use mesh_ipam::store::StoreError;
use proptest::prelude::*;
use serde_json::json;

use world::act::{Act, Done, act};
use world::{GRACE, Running, World, poll};

const MINUTE: Duration = Duration::from_secs(60);

fn random_act(world: &mut World, machine: usize) -> Act {
    match world.dice.below(12) {
        0..=3 => {
            let ips: Vec<IpAddr> = match world.dice.below(8) {
                0 => vec![IpAddr::from([10, 0, 0, world.dice.below(64) as u8])],
                1 => vec![
                    IpAddr::from([10, 0, 1, world.dice.below(16) as u8]),
                    format!("fd00::{:x}", world.dice.below(256)).parse().unwrap(),
                ],
                _ => Vec::new(),
            };
            let pools = if world.dice.percent(10) { vec!["more".to_owned()] } else { Vec::new() };
            let name = format!("p{}", world.dice.below(4));
            Act::Add { name, ips, pools, crash_before_answer: world.dice.percent(5) }
        }
        4..=7 => {
            let uids: Vec<String> = {
                let disk = world.machines[machine].disk.lock().unwrap();
                disk.interfaces.iter().cloned().collect()
            };
            if uids.is_empty() {
                Act::Maintain
            } else {
                Act::Delete(uids[world.dice.below(uids.len())].clone())
            }
        }
        8..=9 => Act::Maintain,
        _ => Act::Sweep,
    }
}

/// Lets `acts` happen at once, one call at a time in random order; each agent may die at any of them.
fn together(world: &mut World, acts: Vec<(usize, Act)>, deadly: bool) -> Vec<(usize, Option<Done>)> {
    let faults: Vec<_> = acts.iter().map(|(machine, _)| world.faults(*machine)).collect();
    let mut taken = Vec::new();
    for (machine, _) in &acts {
        let placeholder = std::mem::replace(&mut world.machines[*machine], blank());
        taken.push(placeholder);
    }
    let mut results: Vec<(usize, Option<Done>)> = acts.iter().map(|(machine, _)| (*machine, None)).collect();
    {
        let clients: Vec<_> = faults
            .into_iter()
            .map(|faults| {
                let client = world.memory.client();
                client.set_faults(faults);
                client
            })
            .collect();
        let mut running: Vec<(usize, Running<'_, Done>)> = taken
            .iter_mut()
            .zip(&clients)
            .zip(&acts)
            .enumerate()
            .map(|(at, ((machine, client), (_, what)))| {
                let future: Running<'_, Done> =
                    Box::pin(act(machine, client, &world.api, world.now, what.clone()));
                (at, future)
            })
            .collect();
        let mut dice = world.dice.clone();
        while !running.is_empty() {
            let next = dice.below(running.len());
            let done = poll(&mut running[next].1);
            let dies = deadly && dice.percent(2);
            if done.is_some() || dies {
                let (at, _) = running.swap_remove(next);
                results[at].1 = done;
            }
        }
        world.dice = dice;
    }
    for ((machine, _), back) in acts.iter().zip(taken) {
        world.machines[*machine] = back;
    }
    for (machine, done) in &results {
        let alive = world.machines[*machine].agent.is_some();
        if alive && done.as_ref().is_none_or(|done| done.dies) {
            world.machines[*machine].start();
        }
    }
    world.check_always();
    results
}

fn blank() -> world::Machine {
    world::Machine {
        identity: mesh_ipam::holdings::Identity { node: String::new(), instance: String::new() },
        boot: 0,
        disk: Default::default(),
        agent: None,
        observations: Default::default(),
        catalogue: Default::default(),
        labels: Default::default(),
        cut_off: false,
        replaced: None,
    }
}

/// The current machine of each name.
fn current(world: &World) -> Vec<usize> {
    (0..world.machines.len()).filter(|at| world.machines[*at].replaced.is_none()).collect()
}

fn statuses(world: &mut World) {
    let mut leases = std::collections::BTreeMap::<String, Vec<IpAddr>>::new();
    for machine in
        world.machines.iter().filter(|machine| machine.agent.is_some() && machine.replaced.is_none())
    {
        for (ip, handle) in &machine.disk.lock().unwrap().leases {
            leases.entry(handle.uid.clone()).or_default().push(*ip);
        }
    }
    let api = world.api.get_mut().unwrap();
    let nodes = api.nodes.clone();
    api.pods.retain(|pod| leases.contains_key(&pod.uid) && nodes.contains_key(&pod.node));
    for pod in &mut api.pods {
        pod.ips = leases.get(&pod.uid).cloned().unwrap_or_default();
    }
}

fn disturb(world: &mut World) {
    let all = current(world);
    let at = all[world.dice.below(all.len())];
    let name = world.machines[at].identity.node.clone();
    match world.dice.below(15) {
        0 => world.machines[at].cut_off = true,
        1..=3 => world.machines[at].cut_off = false,
        4 => world.machines[at].reboot(),
        5 => world.machines[at].start(),
        6 => {
            let (destroyed, new_uid) = (world.dice.percent(50), world.dice.percent(50));
            world.rebuild(at, destroyed, new_uid);
        }
        // The Node goes; its machine may go on.
        7 => {
            let now = world.now;
            let api = world.api.get_mut().unwrap();
            if api.nodes.remove(&name).is_some() {
                api.absent.insert(name.clone(), now);
            }
            api.pods.retain(|pod| pod.node != name);
        }
        // And comes back. What was taken for gone has lost its pods by then.
        8..=9 => {
            let outcast = world.is_outcast(&world.machines[at]);
            if outcast && world.dice.percent(50) {
                world.machines[at].reboot();
            } else if outcast {
                world.machines[at].delete_pods();
            }
            let api = world.api.get_mut().unwrap();
            if !api.nodes.contains_key(&name) {
                let uid = format!("uid{}", api.fresh());
                api.nodes.insert(name.clone(), uid);
                api.absent.remove(&name);
            }
        }
        // A pod's status arrives; objects of pods that went, go.
        10..=12 => statuses(world),
        // The pool is replaced by one with another block size, or closed.
        13 => {
            let size = 28 + world.dice.below(4);
            let disabled = world.dice.percent(20);
            let spec = json!({"cidr": "10.0.0.0/26", "blockSize": size, "disabled": disabled});
            world.api.get_mut().unwrap().pools.insert("four".into(), spec);
        }
        _ => {
            let full = world.dice.percent(20);
            world.machines[at].disk.lock().unwrap().full = full;
            let reserved = format!("10.0.0.{}/32", world.dice.below(64));
            let api = world.api.get_mut().unwrap();
            api.reserved.truncate(3);
            api.reserved.push(reserved);
        }
    }
    // The news of pools arrives when it likes.
    let catalogue = world.api.get_mut().unwrap().catalogue();
    for at in 0..world.machines.len() {
        if world.dice.percent(30) {
            world.machines[at].catalogue = catalogue.clone();
        }
    }
}

fn advance(world: &mut World, time: Duration) {
    world.now += time;
    // Whoever was taken for gone while it ran loses its pods; that its addresses are others' is no fault then.
    world.check_always();
}

/// Trouble ends, and everybody gets time.
fn settle(world: &mut World) {
    world.trouble = 0;
    for at in 0..world.machines.len() {
        let machine = &mut world.machines[at];
        machine.disk.lock().unwrap().full = false;
        if machine.replaced.is_some() {
            machine.agent = None;
            continue;
        }
        let outcast = world.is_outcast(&world.machines[at]);
        let machine = &mut world.machines[at];
        machine.cut_off = false;
        if outcast {
            machine.delete_pods();
        }
    }
    let now = world.now;
    let api = world.api.get_mut().unwrap();
    api.pools.insert("four".into(), json!({"cidr": "10.0.0.0/26", "blockSize": 29}));
    // Half of those that were deleted come back, the others are gone for good.
    let names: Vec<String> = api.absent.keys().cloned().collect();
    let mut gone = Vec::new();
    for (at, name) in names.iter().enumerate() {
        // Somebody must be left to see it.
        if world.dice.percent(50) || (at == 0 && names.len() == 3) {
            let api = world.api.get_mut().unwrap();
            let uid = format!("uid{}", api.fresh());
            api.nodes.insert(name.clone(), uid);
            api.absent.remove(name);
        } else {
            gone.push(name.clone());
        }
    }
    let catalogue = world.api.get_mut().unwrap().catalogue();
    for machine in &mut world.machines {
        machine.catalogue = catalogue.clone();
        if gone.contains(&machine.identity.node) {
            machine.agent = None;
        }
    }
    statuses(world);
    while world.now < now + GRACE.gone * 3 {
        for what in [Act::Maintain, Act::Sweep] {
            for at in current(world) {
                let (_, done) = together(world, vec![(at, what.clone())], false).remove(0);
                if let Some(error) = done.unwrap().error {
                    panic!("{what:?}: {error}");
                }
            }
        }
        advance(world, 15 * MINUTE);
    }
}

fn run(seed: u64, steps: usize) {
    let mut world = World::new(seed, 3);
    for _ in 0..steps {
        let all: Vec<usize> =
            (0..world.machines.len()).filter(|at| world.machines[*at].agent.is_some()).collect();
        let mut acts = Vec::new();
        for at in all {
            if world.dice.percent(50) {
                let what = random_act(&mut world, at);
                acts.push((at, what));
            }
        }
        let calls = world.memory.calls();
        let count = acts.len() as u64;
        for (at, done) in together(&mut world, acts, true) {
            let Some(Done { given, .. }) = done else { continue };
            let machine = &world.machines[at];
            for ip in given {
                assert!(machine.catalogue.is_usable(ip), "{ip} was given");
            }
        }
        assert!(world.memory.calls() - calls <= 400 * count, "{} calls", world.memory.calls() - calls);
        if world.dice.percent(40) {
            disturb(&mut world);
            world.check_always();
        }
        if world.dice.percent(60) {
            let minutes = 1 + world.dice.below(20) as u32;
            advance(&mut world, minutes * MINUTE);
        }
    }
    settle(&mut world);
    world.check_settled();
    fill(&mut world);
}

/// Every address there is can be had, and nothing is called exhausted before.
fn fill(world: &mut World) {
    let mut open = current(world);
    open.retain(|at| world.machines[*at].agent.is_some());
    for round in 0.. {
        assert!(round < 2000);
        if open.is_empty() {
            break;
        }
        let pick = world.dice.below(open.len());
        let at = open[pick];
        let what =
            Act::Add { name: "f".into(), ips: Vec::new(), pools: Vec::new(), crash_before_answer: false };
        let (_, done) = together(world, vec![(at, what)], false).remove(0);
        match done.unwrap().error {
            None => {}
            Some(IpamError::Exhausted(family)) => {
                let node = world.machines[at].identity.node.clone();
                world.check_exhausted(&node, family == mesh_ipam::Family::V4);
                open.swap_remove(pick);
            }
            Some(IpamError::Store(StoreError::Unavailable(why))) => panic!("{why}"),
            Some(error) => panic!("{error}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 0, ..ProptestConfig::default() })]
    #[test]
    fn no_address_is_ever_two_machines_and_none_is_lost(seed in any::<u64>(), steps in 1usize..120) {
        run(seed, steps);
    }
}
