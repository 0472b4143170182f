/**
 * Reading the graph as it will be queued: through subgraphs, reroutes and bypassed nodes.
 *
 * A "place" is a node and the subgraph nodes around it, outermost first, as one subgraph may stand
 * in a graph several times. What cannot be known before a run (a value that some node computes) is
 * `undefined`, and whoever asks says nothing about it.
 */
import { app } from "../../../scripts/app.js"

const NEVER = 2
const BYPASS = 4
/** The id of the node that stands for a subgraph's inputs; a number or a text. */
const SUBGRAPH_INPUT = "-10"

/** The values of these nodes are the values of their outputs. */
const CONSTANTS = ["PrimitiveNode", "PrimitiveString", "PrimitiveStringMultiline"]

/** Every node of the open workflow that is not muted or bypassed, subgraphs' too. */
export function places(graph = app.rootGraph ?? app.graph, hosts = []) {
    return (graph?.nodes ?? [])
        .filter((node) => node.mode !== NEVER && node.mode !== BYPASS)
        .flatMap((node) =>
            node.subgraph ? places(node.subgraph, [...hosts, node]) : [{ node, hosts }]
        )
}

/** The id of a place in the events of a run, such as "12" or "5:3". */
export function executionId({ node, hosts }) {
    return [...hosts, node].map((part) => part.id).join(":")
}

/** What is connected to an input: `{ place, slot }`, `{ value }`, null for nothing. */
export function source({ node, hosts }, index, visited = new Set()) {
    const input = node.inputs?.[index]
    if (!input || visited.has(input)) return undefined
    visited.add(input)
    const link = input.link == null ? null : linkOf(node.graph, input.link)
    if (!link) return input.link == null ? null : undefined
    if (comesFromOutside(link)) return fromOutside(hosts, link.origin_slot, visited)
    const origin = { node: node.graph.getNodeById(link.origin_id), hosts }
    return origin.node ? output(origin, link.origin_slot, input.type, visited) : undefined
}

/** The value of a widget, or of what is connected to it; `undefined` if a run decides it. */
export function valueOf(place, name) {
    const index = place.node.inputs?.findIndex((input) => input.name === name) ?? -1
    const connected = index < 0 ? null : source(place, index)
    if (connected === undefined) return undefined
    if (connected === null) return place.node.widgets?.find((w) => w.name === name)?.value
    if ("value" in connected) return connected.value
    const { node } = connected.place
    if (!CONSTANTS.includes(node.type)) return undefined
    return valueOf(connected.place, node.widgets?.[0]?.name)
}

/** The inputs of a place that take values of a type, connected or not: `[{ name, index }]`. */
export function inputsOf({ node }, type) {
    return (node.inputs ?? [])
        .map((input, index) => ({ name: input.name, type: input.type, index }))
        .filter((input) => input.type === type)
}

function linkOf(graph, id) {
    return graph?.getLink?.(id) ?? graph?.links?.get?.(id) ?? graph?.links?.[id]
}

function comesFromOutside(link) {
    return String(link.origin_id) === SUBGRAPH_INPUT
}

/** What comes into a subgraph through the input `slot` of the node that stands for it. */
function fromOutside(hosts, slot, visited) {
    const host = hosts.at(-1)
    const outer = host && { node: host, hosts: hosts.slice(0, -1) }
    const connected = outer ? source(outer, slot, visited) : undefined
    if (connected !== null) return connected
    const widget = host.getWidgetFromSlot?.(host.inputs[slot])
    return widget ? { value: widget.value } : null
}

function output(origin, slot, type, visited) {
    const { node, hosts } = origin
    if (node.mode === NEVER) return null
    if (node.mode === BYPASS) {
        const same = (node.inputs ?? []).findIndex((input) => input.type === type)
        return same < 0 ? null : source(origin, same, visited)
    }
    if (node.subgraph) {
        const id = node.subgraph.outputs?.[slot]?.linkIds?.[0]
        const link = id == null ? null : linkOf(node.subgraph, id)
        if (!link || comesFromOutside(link)) return undefined
        const inner = { node: node.subgraph.getNodeById(link.origin_id), hosts: [...hosts, node] }
        return inner.node ? output(inner, link.origin_slot, type, visited) : undefined
    }
    if (node.type === "Reroute") return source(origin, 0, visited)
    return { place: origin, slot }
}
