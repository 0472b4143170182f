/** What the server says about trainings, kept for the page: by workflow and node. */

/**
 * @typedef {object} Training one training as `GET /sefi/training` describes it
 * @property {string} workflow id of the workflow that was queued
 * @property {string} node execution id, such as "12", or "5:3" within a subgraph
 * @property {string} prompt_id
 * @property {"running"|"finished"|"stopped"|"cancelled"|"failed"} state
 * @property {string} phase what it is doing while it runs
 * @property {number} step
 * @property {number} steps
 * @property {number|null} seconds_left
 * @property {string} placeholder such as "<anna>"
 * @property {string} message why it failed, or where it stopped
 * @property {number} first index of the first of the losses that are sent
 * @property {Object<string, number[]>} losses
 * @property {{photo: number, preview: number, attention: number}} pictures versions, 0 for none
 * @property {number} resumable step of a snapshot to go on from, 0 for none
 */

/**
 * A training with what an event adds to it.
 *
 * @param {Training|undefined} known with all losses so far
 * @param {Training} event with the losses since the event before
 * @returns {Training|null} null where an event has been missed, so that losses lack
 */
export function merged(known, event) {
    const going = known?.prompt_id === event.prompt_id
    const losses = {}
    for (const [name, values] of Object.entries(event.losses)) {
        const before = going ? (known.losses[name] ?? []) : []
        if (event.first > before.length) return null
        losses[name] = before.slice(0, event.first).concat(values)
    }
    return { ...event, first: 0, losses }
}

/**
 * The nodes of a type with their execution ids, those within subgraphs too.
 *
 * A subgraph that is used twice has one node with two ids.
 *
 * @param {object} graph the root graph
 * @param {string} type
 * @param {string} [path] ids of the subgraph nodes that lead here, with a colon after each
 * @returns {Array<[string, object]>}
 */
export function executionIds(graph, type, path = "") {
    return (graph?.nodes ?? []).flatMap((node) => {
        const id = `${path}${node.id}`
        if (node.subgraph) return executionIds(node.subgraph, type, `${id}:`)
        return node.comfyClass === type ? [[id, node]] : []
    })
}

/**
 * @param {number|null} seconds
 * @returns {string} such as "about 3 min left"; empty where nothing is known
 */
export function timeLeft(seconds) {
    if (seconds === null || seconds === undefined) return ""
    if (seconds < 5) return "a few seconds left"
    if (seconds < 90) return `about ${Math.round(seconds / 5) * 5} s left`
    const minutes = Math.round(seconds / 60)
    if (minutes < 90) return `about ${minutes} min left`
    return `about ${Math.round(minutes / 6) / 10} h left`
}
