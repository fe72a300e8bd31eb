// What the suites ask for. The model is small, so answers are forced to be short: what is tested is the protocol.
import assert from 'node:assert/strict';
import { z } from 'zod';

export const url = process.env.PILOTFISH_URL;
export const model = process.env.PILOTFISH_MODEL;
export const question = 'What is the weather like in Oslo?';
export const messages = [
  { role: 'system', content: 'Be brief.' },
  { role: 'user', content: question },
];

export const Weather = z.object({
  city: z.enum(['Oslo', 'Paris']),
  sky: z.enum(['sunny', 'cloudy', 'rain']),
  windy: z.boolean(),
});
export const Place = z.object({ city: z.enum(['Oslo', 'Paris']), unit: z.enum(['celsius', 'fahrenheit']) });
export const parameters = {
  type: 'object',
  properties: {
    city: { type: 'string', enum: ['Oslo', 'Paris'] },
    unit: { type: 'string', enum: ['celsius', 'fahrenheit'] },
  },
  required: ['city', 'unit'],
  additionalProperties: false,
};

export async function collect(stream) {
  const found = [];
  for await (const each of stream) found.push(each);
  return found;
}

export function check(schema, value) {
  const result = schema.safeParse(typeof value === 'string' ? JSON.parse(value) : value);
  assert.ok(result.success, JSON.stringify(result.error));
}
